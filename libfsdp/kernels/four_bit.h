// Weights in 4 and 8 bits, in bitsandbytes' formats: the arithmetic. C++17; nvcc reads it.
//
// Note [4-bit weights] The flattened tensor is cut into blocks (of 64 elements). A block is kept as
// its largest magnitude in fp32 ("absmax") and as one 4-bit code per element, the number of the
// table's entry nearest to element / absmax; two elements share a byte, the first one in the high
// half. "nf4" has the quantiles of a normal distribution (Dettmers et al. 2023, "QLoRA"), "fp4" a
// sign, two bits of exponent and one of mantissa. With double quantisation the absmax values, less
// their mean, are themselves kept in 8 bits: blocks of 256 in the signed dynamic map of
// quantized_state.h.
//
// Note [bitsandbytes' arithmetic] The bits are those of bitsandbytes 0.50 on the CPU. Where its
// kernels for other devices differ (a division for a product, a search for a table), so do bits of
// files that they wrote; reading needs none of that.
#pragma once

#include "libfsdp/kernels/quantized_state.h"
#include "libfsdp/kernels/rounding.h"

namespace fsdp::kernels {

enum class FourBitCode : int32_t { kNf4, kFp4 };

constexpr int64_t kAbsmaxBlock = 256;  ///< Absmax values per block of double quantisation.

/// 16 values by code, and how a number finds its code: midpoints between neighbours in ascending
/// order, and the codes in that order. FP4's code 8 is zero, not
/// minus zero: so says the table in bitsandbytes' files, while its own readers disagree.
struct FourBitTable {
  float values[16] = {};
  float midpoints[15] = {};
  int32_t order[16] = {};
};

constexpr FourBitTable make_four_bit_table(FourBitCode code) {
  constexpr float kNf4[16] = {-1.0F,
                              -0.6961928009986877F,
                              -0.5250730514526367F,
                              -0.39491748809814453F,
                              -0.28444138169288635F,
                              -0.18477343022823334F,
                              -0.09105003625154495F,
                              0.0F,
                              0.07958029955625534F,
                              0.16093020141124725F,
                              0.24611230194568634F,
                              0.33791524171829224F,
                              0.44070982933044434F,
                              0.5626170039176941F,
                              0.7229568362236023F,
                              1.0F};
  constexpr float kFp4Twelfths[8] = {0.0F, 0.0625F, 8.0F, 12.0F, 4.0F, 6.0F, 2.0F, 3.0F};
  constexpr int32_t kFp4Order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};
  FourBitTable table;
  for (int i = 0; i < 16; ++i) {
    const float magnitude = kFp4Twelfths[i % 8] / 12.0F;
    const float fp4 = i <= 8 ? magnitude : -magnitude;
    table.values[i] = code == FourBitCode::kNf4 ? kNf4[i] : fp4;
    table.order[i] = code == FourBitCode::kNf4 ? i : kFp4Order[i];
  }
  for (int i = 0; i < 15; ++i) {
    table.midpoints[i] = (table.values[table.order[i]] + table.values[table.order[i + 1]]) / 2.0F;
  }
  return table;
}

/// 1e-38, subnormal: what a smaller absmax counts as.
constexpr float kLeastAbsmax = 1e-38F;

/// What the elements of a whole block are multiplied by.
FSDP_HD float four_bit_factor(float absmax) {
  return 1.0F / (absmax < kLeastAbsmax ? kLeastAbsmax : absmax);
}

FSDP_HD float clamp_to_one(float value) {
  const float from_below = value < -1.0F ? -1.0F : value;
  return from_below > 1.0F ? 1.0F : from_below;
}

/// Code of a number in [-1, 1]; between two entries, the lower one's. Without branches: as many
/// additions as there are midpoints.
FSDP_HD int32_t four_bit_code(const FourBitTable& table, float scaled) {
  int32_t code = table.order[0];
  for (int i = 0; i < 15; ++i)
    code += scaled > table.midpoints[i] ? table.order[i + 1] - table.order[i] : 0;
  return code;
}

/// What double quantisation looks up for a number in [-1, 1] (absmax less mean, scaled): the middle
/// of one of 65536 cells, with the result of one multiply-add rounded once. The product is exact in
/// double. NaN (zero times infinity, in a block of subnormal numbers) is in the first cell.
FSDP_HD float absmax_cell(float scaled) {
  const double exact = static_cast<double>((scaled + 1.0F) * 0.5F) * 65535.0 + 0.5;
  const auto cell = static_cast<int32_t>(static_cast<float>(exact >= 0.0 ? exact : 0.0));
  const auto wide = static_cast<float>(cell);
  return (wide + wide) / 65535.0F - 1.0F;
}

/// An absmax from its 8-bit code.
FSDP_HD float absmax_value(float map_value, float nested_absmax, float offset) {
  return map_value * nested_absmax + offset;
}

/// int8: code of an element of a row whose largest magnitude, as a half, is `absmax`.
FSDP_HD int8_t int8_code(float half_value, float absmax) {
  if (absmax == 0) return 0;
  const float scaled = half_value * (1.0F / absmax * 127.0F);
  // To nearest even, for magnitudes below 2^22.
  const float shifted = (scaled + 12582912.0F) - 12582912.0F;
  return static_cast<int8_t>(shifted == shifted ? static_cast<int32_t>(shifted) : 0);
}

FSDP_HD float int8_value(int8_t code, float absmax) {
  return static_cast<float>(code) * absmax * 7.874015718698502e-3F;
}

}  // namespace fsdp::kernels
