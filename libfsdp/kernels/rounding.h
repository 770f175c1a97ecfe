// Rounding of fp32 to bfloat16 and half: to nearest, and at random. The same bits on every device,
// see Note [Bits do not depend on where an element lies] in element_math.h. C++17; nvcc reads it.
#pragma once

#include "libfsdp/kernels/element_math.h"

namespace fsdp::kernels {

/// Bits of the nearest bfloat16, ties to even; NaN becomes a quiet NaN.
FSDP_HD uint16_t round_bf16(float value) {
  const uint32_t bits = float_bits(value);
  const bool is_nan = (bits & 0x7fffffffU) > 0x7f800000U;
  const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x0040U;
  return static_cast<uint16_t>(is_nan ? quiet : rounded);
}

/// Bits of the nearest half, ties to even; infinite from 65520 on; NaN becomes a quiet NaN.
FSDP_HD uint16_t round_f16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  const uint32_t normal = (magnitude + 0xfffU + ((magnitude >> 13) & 1U) - (112U << 23)) >> 13;
  // 0.5 + x leaves the 10 bits of a subnormal half at the bottom, rounded to nearest even.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5F) - float_bits(0.5F);
  uint32_t result = magnitude < (113U << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000U ? 0x7c00U : result;
  result = magnitude > 0x7f800000U ? 0x7e00U : result;
  return static_cast<uint16_t>(result | sign);
}

/// Chooses one stream of random words.
struct RoundingKey {
  uint64_t base = 0;
  uint32_t key = 0;
};

/// The stream of one parameter in one step.
inline RoundingKey rounding_key(uint64_t seed, int64_t step, uint64_t parameter) {
  uint64_t state = 0;
  const uint64_t words[] = {seed, static_cast<uint64_t>(step), parameter};
  for (const uint64_t word : words) {
    state = (state ^ word) + 0x9e3779b97f4a7c15ULL;  // Then the finaliser of SplitMix64.
    state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9ULL;
    state = (state ^ (state >> 27)) * 0x94d049bb133111ebULL;
    state ^= state >> 31;
  }
  return {state, static_cast<uint32_t>((state * 0xd1342543de82ef95ULL) >> 32)};
}

/// Word number `index` of a stream: Philox 2x32 with 7 rounds (Salmon et al. 2011, "Parallel random
/// numbers: as easy as 1, 2, 3"), whose counter is the index.
FSDP_HD uint32_t random_word(const RoundingKey& stream, int64_t index) {
  const uint64_t counter = stream.base + static_cast<uint64_t>(index);
  auto left = static_cast<uint32_t>(counter);
  auto right = static_cast<uint32_t>(counter >> 32);
  uint32_t key = stream.key;
  for (int round = 0; round < 7; ++round) {
    const uint64_t product = uint64_t{0xd256d193U} * left;
    left = static_cast<uint32_t>(product >> 32) ^ key ^ right;
    right = static_cast<uint32_t>(product);
    key += 0x9e3779b9U;
  }
  return left;
}

/// One of the two bfloat16 beside `value`, the nearer with the greater probability, so that the
/// mean is `value` exactly; 16 bits of `random` are used. A bfloat16 comes back as it is. Above the
/// largest finite one the upper neighbour is infinite.
FSDP_HD uint16_t round_bf16_stochastic(float value, uint32_t random) {
  const uint32_t bits = float_bits(value);
  const bool is_finite = is_finite_bits(bits);
  const uint32_t rounded = (bits + (random >> 16)) >> 16;
  return static_cast<uint16_t>(is_finite ? rounded : round_bf16(value));
}

}  // namespace fsdp::kernels
