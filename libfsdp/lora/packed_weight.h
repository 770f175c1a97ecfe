// A matrix as packed bytes: codes, then scales, then scales of scales, each on 64 bytes.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <string_view>
#include <utility>

namespace fsdp::lora {

enum class PackedFormat { kNf4, kFp4, kInt8 };
constexpr std::array<std::pair<PackedFormat, std::string_view>, 3> names_of(PackedFormat) {
  return {
      {{PackedFormat::kNf4, "nf4"}, {PackedFormat::kFp4, "fp4"}, {PackedFormat::kInt8, "int8"}}};
}

/// Where what lies in the bytes of one weight. The bits are bitsandbytes'.
struct PackedWeight {
  PackedFormat format = PackedFormat::kNf4;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t blocksize = 64;  ///< Elements of a scale; of int8 the columns.
  bool double_quant = false;

  int64_t numel() const { return rows * columns; }
  int64_t scales() const { return (numel() + blocksize - 1) / blocksize; }
  int64_t code_bytes() const { return format == PackedFormat::kInt8 ? numel() : (numel() + 1) / 2; }
  int64_t elements_per_code_byte() const { return format == PackedFormat::kInt8 ? 1 : 2; }
  /// First bytes of the scales (fp32, or uint8 with double_quant), of the scales of these (fp32),
  /// and of their offset (one fp32).
  int64_t scales_at() const;
  int64_t nested_at() const;
  int64_t offset_at() const;
  int64_t bytes() const;
};

/// The matrix [rows, columns] as `type`. Shapes: packed uint8 [bytes()]. Cost: one pass.
at::Tensor unpack(const PackedWeight& weight, const at::Tensor& packed, at::ScalarType type);

}  // namespace fsdp::lora
