#include "libfsdp/kernels/cpu_clones.h"
#include "libfsdp/kernels/update.h"

namespace fsdp::kernels {
namespace {

constexpr DynamicMap kSignedMap = make_dynamic_map(true);
constexpr DynamicMap kUnsignedMap = make_dynamic_map(false);

/// Codes of a block's values and its scale.
FSDP_HD void quantize_block(const float* __restrict values, int64_t n, const DynamicMap& map,
                            uint8_t* __restrict codes, float& absmax) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = bits_float(float_bits(values[i]) & 0x7fffffffU);
    largest = magnitude > largest ? magnitude : largest;
  }
  const float divisor = block_divisor(largest);
  for (int64_t i = 0; i < n; ++i) codes[i] = nearest_code(map.midpoints, values[i] / divisor);
  absmax = largest;
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
    quantize_block(first, count, kSignedMap, state.code1 + begin, absmax1);
    quantize_block(second, count, kUnsignedMap, state.code2 + begin, absmax2);
  }
};

}  // namespace

const DynamicMap& signed_dynamic_map() { return kSignedMap; }
const DynamicMap& unsigned_dynamic_map() { return kUnsignedMap; }

FSDP_CPU_CLONES
void adamw_8bit(const ParameterArrays& parameter, const float* gradient,
                const QuantizedState& state, int64_t n, const AdamWScalars& scalars) {
  with_parameter(parameter, QuantizedAdamWLoop{gradient, state, n, scalars});
}

}  // namespace fsdp::kernels
