#include <bit>

#include "libfsdp/kernels/cpu_clones.h"
#include "libfsdp/kernels/update.h"

namespace fsdp::kernels {
namespace {

constexpr DynamicMap kSignedMap = make_dynamic_map(true);
constexpr DynamicMap kUnsignedMap = make_dynamic_map(false);

/// nearest_code() by one look into a table and one comparison, where a search would mispredict most
/// of its 8 branches.
///
/// The numbers of one sign, exponent and leading 8 bits of the mantissa make a cell, which is so
/// narrow that it holds at most one midpoint. The table has the code of each cell's lower end. All
/// magnitudes below 2^-23 share the first cell: the least midpoint is larger.
class CodeTable {
 public:
  constexpr explicit CodeTable(const DynamicMap& map) {
    for (int i = 0; i < 255; ++i) midpoints_[i] = map.midpoints[i];
    midpoints_[255] = 2;
    for (uint32_t cell = 0; cell < kCells; ++cell) {
      const uint32_t first = kLowest + (cell << kCellBits);
      codes_[cell] = search(cell == 0 ? 0.0F : std::bit_cast<float>(first));
      codes_[kCells + cell] = search(-std::bit_cast<float>(first + (1U << kCellBits) - 1));
    }
  }

  /// Codes of up to kStateBlock values in [-1, 1]. Only the loads in the middle are one by one; the
  /// loops around them are vectors.
  FSDP_HD void find(const float* __restrict values, int64_t n, uint8_t* __restrict codes) const {
    uint32_t cells[kStateBlock];
    float bounds[kStateBlock];
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = float_bits(values[i]);
      const uint32_t magnitude = bits & 0x7fffffffU;
      const uint32_t above = magnitude > kLowest ? magnitude - kLowest : 0;
      cells[i] = (above >> kCellBits) + (bits >> 31) * kCells;
    }
    for (int64_t i = 0; i < n; ++i) {
      const uint8_t code = codes_[cells[i]];
      codes[i] = code;
      bounds[i] = midpoints_[code];
    }
    for (int64_t i = 0; i < n; ++i) {
      codes[i] = static_cast<uint8_t>(codes[i] + (values[i] > bounds[i] ? 1 : 0));
    }
  }

 private:
  static constexpr uint32_t kCellBits = 15;
  static constexpr uint32_t kLowest = std::bit_cast<uint32_t>(0x1p-23F);
  static constexpr uint32_t kCells = ((std::bit_cast<uint32_t>(1.0F) - kLowest) >> kCellBits) + 1;

  /// As nearest_code(), which compilers cannot run.
  constexpr uint8_t search(float value) const {
    int code = 0;
    for (int step = 128; step > 0; step /= 2) {
      if (value > midpoints_[code + step - 1]) code += step;
    }
    return static_cast<uint8_t>(code);
  }

  float midpoints_[256] = {};       // The last one stops the comparison of code 255.
  uint8_t codes_[2 * kCells] = {};  // Of positive numbers, then of negative ones.
};

constexpr CodeTable kSignedCodes(kSignedMap);
constexpr CodeTable kUnsignedCodes(kUnsignedMap);

/// Codes of a block's values and its scale. The values are overwritten.
FSDP_HD void quantize_block(float* __restrict values, int64_t n, const CodeTable& table,
                            uint8_t* __restrict codes, float& absmax) {
  uint32_t largest = 0;  // Magnitudes are ordered as their bits are.
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = float_bits(values[i]) & 0x7fffffffU;
    largest = magnitude > largest ? magnitude : largest;
  }
  absmax = bits_float(largest);
  const float divisor = block_divisor(absmax);
  for (int64_t i = 0; i < n; ++i) values[i] = values[i] / divisor;
  table.find(values, n, codes);
}

struct QuantizedAdamWLoop {
  const float* __restrict gradient;
  QuantizedState state;
  int64_t n;
  AdamWScalars scalars;

  template <class Parameter>
  FSDP_HD void operator()(Parameter parameter) const {
    for (int64_t begin = 0; begin < n; begin += kStateBlock) {
      update_block(parameter, begin, n - begin < kStateBlock ? n - begin : kStateBlock);
    }
  }

  template <class Parameter>
  FSDP_HD void update_block(Parameter parameter, int64_t begin, int64_t count) const {
    const AdamWScalars s = scalars;
    float first[kStateBlock];
    float second[kStateBlock];
    float& absmax1 = state.absmax1[begin / kStateBlock];
    float& absmax2 = state.absmax2[begin / kStateBlock];
    const float scale1 = absmax1;
    const float scale2 = absmax2;
    const uint8_t* __restrict code1 = state.code1 + begin;
    const uint8_t* __restrict code2 = state.code2 + begin;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      float m = kSignedMap.values[code1[i]] * scale1;
      float v = kUnsignedMap.values[code2[i]] * scale2;
      const int64_t at = begin + i;
      parameter.store(at, adamw_element(parameter.load(at), gradient[at], m, v, s));
      first[i] = m;
      second[i] = v;
    }
    quantize_block(first, count, kSignedCodes, state.code1 + begin, absmax1);
    quantize_block(second, count, kUnsignedCodes, state.code2 + begin, absmax2);
  }
};

}  // namespace

void find_codes(const float* values, int64_t n, bool is_signed, uint8_t* codes) {
  const CodeTable& table = is_signed ? kSignedCodes : kUnsignedCodes;
  for (int64_t begin = 0; begin < n; begin += kStateBlock) {
    table.find(values + begin, n - begin < kStateBlock ? n - begin : kStateBlock, codes + begin);
  }
}

const DynamicMap& signed_dynamic_map() { return kSignedMap; }
const DynamicMap& unsigned_dynamic_map() { return kUnsignedMap; }

FSDP_CPU_CLONES
void adamw_8bit(const ParameterArrays& parameter, const float* gradient,
                const QuantizedState& state, int64_t n, const AdamWScalars& scalars) {
  with_parameter(parameter, QuantizedAdamWLoop{gradient, state, n, scalars});
}

}  // namespace fsdp::kernels
