#include "libfsdp/base/dtype.h"

#include <array>
#include <cstring>

#include "libfsdp/base/error.h"

namespace fsdp {
namespace {

struct DTypeInfo {
  std::string_view name;
  size_t bytes;
};
constexpr std::array<DTypeInfo, 10> kInfo = {{{"float64", 8},
                                              {"float32", 4},
                                              {"float16", 2},
                                              {"bfloat16", 2},
                                              {"int64", 8},
                                              {"int32", 4},
                                              {"int16", 2},
                                              {"int8", 1},
                                              {"uint8", 1},
                                              {"bool", 1}}};

float load_float(const void* from, DType dtype, size_t i) {
  switch (dtype) {
    case DType::kF64:
      return static_cast<float>(static_cast<const double*>(from)[i]);
    case DType::kF32:
      return static_cast<const float*>(from)[i];
    case DType::kF16:
      return f16_to_float(static_cast<const uint16_t*>(from)[i]);
    case DType::kBF16:
      return bf16_to_float(static_cast<const uint16_t*>(from)[i]);
    default:
      throw InternalError(cat("convert_floats: ", dtype_name(dtype), " is not a floating type"));
  }
}

void store_float(float value, void* to, DType dtype, size_t i) {
  switch (dtype) {
    case DType::kF64:
      static_cast<double*>(to)[i] = value;
      return;
    case DType::kF32:
      static_cast<float*>(to)[i] = value;
      return;
    case DType::kF16:
      static_cast<uint16_t*>(to)[i] = float_to_f16(value);
      return;
    case DType::kBF16:
      static_cast<uint16_t*>(to)[i] = float_to_bf16(value);
      return;
    default:
      throw InternalError(cat("convert_floats: ", dtype_name(dtype), " is not a floating type"));
  }
}

}  // namespace

size_t dtype_bytes(DType dtype) { return kInfo.at(static_cast<size_t>(dtype)).bytes; }

std::string_view dtype_name(DType dtype) { return kInfo.at(static_cast<size_t>(dtype)).name; }

DType dtype_from_name(std::string_view name) {
  std::string known;
  for (size_t i = 0; i < kInfo.size(); ++i) {
    if (kInfo[i].name == name) return static_cast<DType>(i);
    known += cat(i ? ", " : "", kInfo[i].name);
  }
  throw ConfigError(cat("unknown dtype '", name, "'. Known: ", known));
}

float f16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000U} << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fU;
  uint32_t mantissa = bits & 0x3ffU;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000U | (mantissa << 13));
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;  // Subnormal: exact in float.
  return sign ? -magnitude : magnitude;
}

uint16_t float_to_f16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return static_cast<uint16_t>(sign | 0x7e00U);
  if (magnitude >= 0x477ff000U)
    return static_cast<uint16_t>(sign | 0x7c00U);  // Rounds to 65536 or more.
  if (magnitude < 0x38800000U) {                   // Subnormal half or zero.
    // Adding 0.5 leaves exactly the half's 10 mantissa bits at the bottom, rounded to nearest even.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000U));
  }
  const uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
}

void convert_floats(const void* from, DType from_dtype, void* to, DType to_dtype, size_t n) {
  if (n == 0) return;  // The pointers may be null, which memcpy must not see.
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, n * dtype_bytes(from_dtype));
    return;
  }
  if (from_dtype == DType::kF64 && to_dtype != DType::kF32 && to_dtype != DType::kF64) {
    for (size_t i = 0; i < n; ++i) store_float(load_float(from, from_dtype, i), to, to_dtype, i);
    return;
  }
  if (from_dtype == DType::kBF16 && to_dtype == DType::kF32) {
    const auto* in = static_cast<const uint16_t*>(from);
    auto* out = static_cast<float*>(to);
    for (size_t i = 0; i < n; ++i) out[i] = bf16_to_float(in[i]);
    return;
  }
  if (from_dtype == DType::kF32 && to_dtype == DType::kBF16) {
    const auto* in = static_cast<const float*>(from);
    auto* out = static_cast<uint16_t*>(to);
    for (size_t i = 0; i < n; ++i) out[i] = float_to_bf16(in[i]);
    return;
  }
  for (size_t i = 0; i < n; ++i) store_float(load_float(from, from_dtype, i), to, to_dtype, i);
}

}  // namespace fsdp
