#include "libfsdp/kernels/gradient_sums.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/cpu_clones.h"

namespace fsdp::kernels {

namespace {

// The 8 lanes of a quantum as one vector; the compiler lowers it to what the instruction set has.
static_assert(kQuantumLanes == 8);
using Lanes = double __attribute__((vector_size(64)));

template <NormType kType>
FSDP_HD int64_t quantum_sums_loop(const float* __restrict values, int64_t n,
                                  double* __restrict sums) {
  int64_t non_finite = 0;
  for (int64_t begin = 0; begin < n; begin += kQuantum) {
    // Terms first, lanes after: g++ 12 makes one instruction of each conversion in a plain loop,
    // five in a vector.
    alignas(64) double terms[kQuantum];
    uint32_t bad = 0;
    for (int64_t i = 0; i < kQuantum; ++i) terms[i] = norm_term<kType>(values[begin + i]);
    for (int64_t i = 0; i < kQuantum; ++i)
      bad += is_finite_bits(float_bits(values[begin + i])) ? 0 : 1;
    Lanes lanes = {};
    for (int64_t row = 0; row < kQuantum; row += kQuantumLanes) {
      Lanes loaded;
      std::memcpy(&loaded, terms + row, sizeof loaded);
      lanes += loaded;
    }
    const double sum = combine_quantum_lanes([&](int j) { return lanes[j]; });
    sums[begin / kQuantum] = bad == 0 ? sum : 0.0;
    non_finite += bad;
  }
  return non_finite;
}

FSDP_CPU_CLONES
int64_t square_sums(const float* values, int64_t n, double* sums) {
  return quantum_sums_loop<NormType::kTwo>(values, n, sums);
}

FSDP_CPU_CLONES
int64_t magnitude_sums(const float* values, int64_t n, double* sums) {
  return quantum_sums_loop<NormType::kOne>(values, n, sums);
}

}  // namespace

int64_t quantum_sums(const float* values, int64_t n, NormType type, double* sums) {
  check(type != NormType::kInf, "the infinity norm has no sums");
  return type == NormType::kTwo ? square_sums(values, n, sums) : magnitude_sums(values, n, sums);
}

FSDP_CPU_CLONES
float largest_magnitude(const float* values, int64_t n, float at_least, int64_t& non_finite) {
  // Magnitudes are ordered as their bits are.
  uint32_t largest = float_bits(at_least);
  int64_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = float_bits(values[i]) & 0x7fffffffU;
    const bool finite = is_finite_bits(magnitude);
    bad += finite ? 0 : 1;
    const uint32_t candidate = finite ? magnitude : 0U;
    largest = candidate > largest ? candidate : largest;
  }
  non_finite += bad;
  return bits_float(largest);
}

void add_gradient_sums(const float* values, int64_t n, NormType type, GradientSums& total) {
  check(n % kQuantum == 0, "add_gradient_sums: the number of elements is not a multiple of 128");
  if (type == NormType::kInf) {
    total.max_abs = largest_magnitude(values, n, total.max_abs, total.non_finite);
    return;
  }
  std::array<double, 64> sums;
  constexpr int64_t kBlockNumel = kQuantum * static_cast<int64_t>(sums.size());
  for (int64_t begin = 0; begin < n; begin += kBlockNumel) {
    const int64_t count = std::min(kBlockNumel, n - begin);
    total.non_finite += quantum_sums(values + begin, count, type, sums.data());
    for (int64_t q = 0; q < count / kQuantum; ++q) total.sum.add(sums[static_cast<size_t>(q)]);
  }
}

}  // namespace fsdp::kernels
