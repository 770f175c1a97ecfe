// "quantization_config" of a model's config.json, for weights that bitsandbytes quantised.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/io/json.h"

namespace fsdp::io {

enum class QuantKind : uint8_t { kNf4, kFp4, kInt8 };

/// "nf4", "fp4", "int8".
std::string_view quant_kind_name(QuantKind kind);

struct QuantizationConfig {
  QuantKind kind = QuantKind::kNf4;
  bool double_quant = false;   ///< 4 bits: whether the scales are quantised too.
  DType storage = DType::kU8;  ///< 4 bits: element type that the bytes are stored as.
  std::string compute_dtype = "float32";
  double int8_threshold = 6.0;
  /// Modules that stay as they are, and the output head; empty = the head only.
  std::optional<std::vector<std::string>> skip_modules;
  Json source;  ///< The object itself, for to_json().

  /// Of config.json's document; empty when the model is not quantised. Throws: ModelError for a
  /// method other than bitsandbytes' (by name), for int8 with 16-bit weights kept, for values that
  /// make no sense.
  static std::optional<QuantizationConfig> from_model_config(const Json& config,
                                                             const std::string& where);
  /// The object as transformers writes it: members sorted, those of `source` that mean nothing to
  /// us kept.
  Json to_json() const;
};

/// `config` with this "quantization_config" (its members stay sorted if they were), or without one.
Json with_quantization(const Json& config, const std::optional<QuantizationConfig>& quantization);

}  // namespace fsdp::io
