// The CPU's loops for quantised weights behind C functions, for race_bitsandbytes.py.
#include "libfsdp/kernels/quantized_weight.h"

namespace {
fsdp::DType dtype_of(int type) {
  constexpr fsdp::DType kTypes[] = {fsdp::DType::kF32, fsdp::DType::kBF16};
  return kTypes[type];
}
}  // namespace

extern "C" {

__attribute__((visibility("default"))) void fsdp_dequantize_4bit(const uint8_t* packed,
                                                                 const float* absmax, int64_t numel,
                                                                 int code, void* values, int type) {
  fsdp::kernels::dequantize_4bit(packed, absmax, numel,
                                 static_cast<fsdp::kernels::FourBitCode>(code), 64, values,
                                 dtype_of(type));
}

__attribute__((visibility("default"))) void fsdp_quantize_4bit(const void* values, int type,
                                                               int64_t numel, int code,
                                                               uint8_t* packed, float* absmax) {
  fsdp::kernels::quantize_4bit(values, dtype_of(type), numel,
                               static_cast<fsdp::kernels::FourBitCode>(code), 64, packed, absmax);
}
}
