// What floats are rounded to where they are stored: the counterpart of the sources in
// element_math.h. C++17; nvcc reads it.
#pragma once

#include "libfsdp/kernels/rounding.h"

namespace fsdp::kernels {

struct ToF32 {
  using Storage = float;
  static FSDP_HD float round(float value) { return value; }
};
struct ToBf16 {
  using Storage = uint16_t;
  static FSDP_HD uint16_t round(float value) { return round_bf16(value); }
};
struct ToF16 {
  using Storage = uint16_t;
  static FSDP_HD uint16_t round(float value) { return round_f16(value); }
};

/// A source's element as a half, widened.
template <class Source>
FSDP_HD float as_half(typename Source::Storage value) {
  return F16Source::widen(round_f16(Source::widen(value)));
}

}  // namespace fsdp::kernels
