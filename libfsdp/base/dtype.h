// Element types that libfsdp stores, moves and computes with.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace fsdp {

enum class DType : uint8_t { kF64, kF32, kF16, kBF16, kI64, kI32, kI16, kI8, kU8, kBool };

/// Bytes of one element.
size_t dtype_bytes(DType dtype);

/// Our name, which is PyTorch's: "float32", "bfloat16", "int64", ...
std::string_view dtype_name(DType dtype);

/// Inverse of dtype_name; throws ConfigError that lists the known names.
DType dtype_from_name(std::string_view name);

/// Bits of a bfloat16 as a float.
inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

/// Nearest bfloat16, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

/// IEEE half conversions, ties to even; overflow gives infinity.
float f16_to_float(uint16_t bits);
uint16_t float_to_f16(float value);

/// Converts n elements between floating types (f32, bf16, f16, f64), rounding to nearest even.
/// Throws InternalError for a type that is not floating. `to` and `from` must not overlap.
void convert_floats(const void* from, DType from_dtype, void* to, DType to_dtype, size_t n);

}  // namespace fsdp
