#include "libfsdp/kernels/square_sum.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/cpu_clones.h"
#include "libfsdp/kernels/element_math.h"

namespace fsdp::kernels {

namespace {

// The 8 lanes of a quantum as one vector; the compiler lowers it to what the instruction set has.
static_assert(kSquareLanes == 8);
using Lanes = double __attribute__((vector_size(64)));

}  // namespace

FSDP_CPU_CLONES
int64_t quantum_square_sums(const float* __restrict values, int64_t n, double* __restrict sums) {
  int64_t non_finite = 0;
  for (int64_t begin = 0; begin < n; begin += kQuantum) {
    // Squares first, lanes after: g++ 12 makes one instruction of each conversion in a plain loop,
    // five in a vector.
    alignas(64) double squares[kQuantum];
    uint32_t bad = 0;
    for (int64_t i = 0; i < kQuantum; ++i) {
      const auto wide = static_cast<double>(values[begin + i]);
      squares[i] = wide * wide;
    }
    for (int64_t i = 0; i < kQuantum; ++i)
      bad += is_finite_bits(float_bits(values[begin + i])) ? 0 : 1;
    Lanes lanes = {};
    for (int64_t row = 0; row < kQuantum; row += kSquareLanes) {
      Lanes loaded;
      std::memcpy(&loaded, squares + row, sizeof loaded);
      lanes += loaded;
    }
    const double sum = combine_square_lanes([&](int j) { return lanes[j]; });
    sums[begin / kQuantum] = bad == 0 ? sum : 0.0;
    non_finite += bad;
  }
  return non_finite;
}

void add_square_sums(const float* values, int64_t n, SquareSum& total) {
  check(n % kQuantum == 0, "add_square_sums: the number of elements is not a multiple of 128");
  std::array<double, 64> sums;
  constexpr int64_t kBlockNumel = kQuantum * static_cast<int64_t>(sums.size());
  for (int64_t begin = 0; begin < n; begin += kBlockNumel) {
    const int64_t count = std::min(kBlockNumel, n - begin);
    total.non_finite += quantum_square_sums(values + begin, count, sums.data());
    for (int64_t q = 0; q < count / kQuantum; ++q) total.sum.add(sums[static_cast<size_t>(q)]);
  }
}

}  // namespace fsdp::kernels
