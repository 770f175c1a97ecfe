// Optimizer state in 8 bits, in bitsandbytes' format: the arithmetic. C++17; nvcc reads it.
//
// Note [8-bit state] A block of 256 elements is kept as one fp32 scale, the largest magnitude in
// the block ("absmax"), and 256 codes: numbers of the entry of a fixed table ("dynamic map") that
// lies nearest to value / absmax. The table has a decimal exponent and, the larger the exponent,
// the more steps: 7 decades, of which the top one has 64 steps (signed) or 128 (unsigned). See
// Dettmers et al. 2022, "8-bit optimizers via block-wise quantization".
#pragma once

#include "libfsdp/kernels/element_math.h"

namespace fsdp::kernels {

constexpr int64_t kStateBlock = 256;

/// A table of 256 values in ascending order, and the midpoints between neighbours.
struct DynamicMap {
  float values[256] = {};
  float midpoints[255] = {};
};

/// Mean of neighbours `index` and `index + 1` of `points` evenly spaced numbers from 0.1 to 1, with
/// the bits of torch's linspace: from both ends towards the middle, product and sum rounded once.
constexpr float dynamic_map_mean(int index, int points) {
  const float step = (1.0F - 0.1F) / static_cast<float>(points - 1);
  float ends[2] = {};
  for (int k = 0; k < 2; ++k) {
    const int i = index + k;
    const double wide =
        i < points / 2 ? double{0.1F} + double{step} * i : 1.0 - double{step} * (points - 1 - i);
    ends[k] = static_cast<float>(wide);
  }
  return (ends[0] + ends[1]) / 2.0F;
}

/// bitsandbytes' create_dynamic_map(signed).
constexpr DynamicMap make_dynamic_map(bool is_signed) {
  constexpr float kDecades[7] = {1e-6F, 1e-5F, 1e-4F, 1e-3F, 1e-2F, 1e-1F, 1.0F};
  DynamicMap map;
  const int zero = is_signed ? 127 : 0;
  int at = zero + 1;
  for (int decade = 0; decade < 7; ++decade) {
    const int steps = (is_signed ? 1 : 2) << decade;
    for (int i = 0; i < steps; ++i, ++at) {
      const float value = kDecades[decade] * dynamic_map_mean(i, steps + 1);
      map.values[at] = value;
      if (is_signed) map.values[2 * zero - at] = -value;
    }
  }
  map.values[255] = 1.0F;
  for (int i = 0; i < 255; ++i) map.midpoints[i] = (map.values[i] + map.values[i + 1]) / 2.0F;
  return map;
}

/// Number of the entry nearest to `value`; between two, the lower one.
FSDP_HD uint8_t nearest_code(const float* midpoints, float value) {
  uint32_t code = 0;
  for (uint32_t step = 128; step > 0; step /= 2) {
    code += value > midpoints[code + step - 1] ? step : 0;
  }
  return static_cast<uint8_t>(code);
}

/// What values of a block are divided by before they are looked up; a block of zeros has no scale.
FSDP_HD float block_divisor(float absmax) { return absmax > 0 ? absmax : 1.0F; }

/// The state of a range: n codes of either moment, and a scale per block of 256.
struct QuantizedState {
  uint8_t* code1 = nullptr;  ///< exp_avg, signed map.
  float* absmax1 = nullptr;
  uint8_t* code2 = nullptr;  ///< exp_avg_sq, unsigned map.
  float* absmax2 = nullptr;
};

/// codes[i] = nearest_code(midpoints, values[i]) of the signed or the unsigned map, in the way of
/// the CPU loops. Values lie in [-1, 1].
void find_codes(const float* values, int64_t n, bool is_signed, uint8_t* codes);

/// The maps of exp_avg and exp_avg_sq, in host memory.
const DynamicMap& signed_dynamic_map();
const DynamicMap& unsigned_dynamic_map();

}  // namespace fsdp::kernels
