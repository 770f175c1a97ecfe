#include "libfsdp/kernels/square_sum.h"

#include <algorithm>
#include <array>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/cpu_clones.h"
#include "libfsdp/kernels/element_math.h"

namespace fsdp::kernels {

FSDP_CPU_CLONES
int64_t quantum_square_sums(const float* __restrict values, int64_t n, double* __restrict sums) {
  int64_t non_finite = 0;
  for (int64_t begin = 0; begin < n; begin += kQuantum) {
    double lanes[kSquareLanes] = {};
    int32_t bad = 0;
    for (int64_t row = begin; row < begin + kQuantum; row += kSquareLanes) {
      for (int j = 0; j < kSquareLanes; ++j) {
        const auto wide = static_cast<double>(values[row + j]);
        lanes[j] += wide * wide;
      }
    }
    for (int64_t i = begin; i < begin + kQuantum; ++i)
      bad += is_finite_bits(float_bits(values[i])) ? 0 : 1;
    const double sum = combine_square_lanes([&](int j) { return lanes[j]; });
    sums[begin / kQuantum] = bad == 0 ? sum : 0.0;
    non_finite += bad;
  }
  return non_finite;
}

void add_square_sums(const float* values, int64_t n, SquareSum& total) {
  check(n % kQuantum == 0,
        cat("add_square_sums: ", n, " elements are not a multiple of ", kQuantum));
  std::array<double, 64> sums;
  constexpr int64_t kBlockNumel = kQuantum * static_cast<int64_t>(sums.size());
  for (int64_t begin = 0; begin < n; begin += kBlockNumel) {
    const int64_t count = std::min(kBlockNumel, n - begin);
    total.non_finite += quantum_square_sums(values + begin, count, sums.data());
    for (int64_t q = 0; q < count / kQuantum; ++q) total.sum.add(sums[static_cast<size_t>(q)]);
  }
}

}  // namespace fsdp::kernels
