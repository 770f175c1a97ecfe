#include "libfsdp/io/quantization_config.h"

#include <algorithm>
#include <array>

namespace fsdp::io {
namespace {

constexpr std::string_view kKey = "quantization_config";
constexpr std::array kStorages = {DType::kU8,   DType::kI8,  DType::kF16,
                                  DType::kBF16, DType::kF32, DType::kF64};

bool flag(const Json& json, const char* name, const char* private_name) {
  return json.get<bool>(name, json.get<bool>(private_name, false));
}

DType storage_of(const std::string& name) {
  for (const DType dtype : kStorages) {
    if (dtype_name(dtype) == name) return dtype;
  }
  throw JsonError(cat("'bnb_4bit_quant_storage': unknown type '", name, "'"));
}

QuantKind kind_of(const Json& json) {
  const bool in_4bit = flag(json, "load_in_4bit", "_load_in_4bit");
  const bool in_8bit = flag(json, "load_in_8bit", "_load_in_8bit");
  if (in_4bit == in_8bit)
    throw JsonError(cat("expected one of 'load_in_4bit' and 'load_in_8bit', got ",
                        in_4bit ? "both" : "neither"));
  if (in_8bit) return QuantKind::kInt8;
  const auto type = json.get("bnb_4bit_quant_type", "fp4");
  if (type == "nf4") return QuantKind::kNf4;
  if (type == "fp4") return QuantKind::kFp4;
  throw JsonError(cat("'bnb_4bit_quant_type' is '", type, "'; expected 'nf4' or 'fp4'"));
}

QuantizationConfig parse(const Json& json) {
  const auto method = json.get("quant_method", "bitsandbytes");
  if (method != "bitsandbytes")
    throw JsonError(cat("weights quantised by '", method,
                        "' cannot be read. Hint: only bitsandbytes' formats can; dequantise the "
                        "model with the tool that made it"));
  if (json.get<bool>("llm_int8_has_fp16_weight", false))
    throw JsonError("'llm_int8_has_fp16_weight' is true: such weights are not quantised");
  QuantizationConfig config;
  config.kind = kind_of(json);
  config.double_quant = json.get<bool>("bnb_4bit_use_double_quant", false);
  config.storage = storage_of(json.get("bnb_4bit_quant_storage", "uint8"));
  config.compute_dtype = json.get("bnb_4bit_compute_dtype", "float32");
  config.int8_threshold = json.get<double>("llm_int8_threshold", 6.0);
  if (const Json* skip = json.find("llm_int8_skip_modules"); skip != nullptr && !skip->is_null())
    config.skip_modules = skip->as<std::vector<std::string>>();
  config.source = json;
  return config;
}

}  // namespace

std::string_view quant_kind_name(QuantKind kind) {
  constexpr std::array<std::string_view, 3> kNames = {"nf4", "fp4", "int8"};
  return kNames[static_cast<size_t>(kind)];
}

std::optional<QuantizationConfig> QuantizationConfig::from_model_config(const Json& config,
                                                                        const std::string& where) {
  const Json* const json = config.find(kKey);
  if (json == nullptr || json->is_null()) return std::nullopt;
  try {
    return parse(*json);
  } catch (const JsonError& error) {
    throw ModelError(cat(where, ": '", kKey, "': ", error.what()));
  }
}

Json QuantizationConfig::to_json() const {
  const bool is_int8 = kind == QuantKind::kInt8;
  const Json skip = skip_modules ? Json(*skip_modules) : Json();
  Json::Object members = {
      {"_load_in_4bit", !is_int8},
      {"_load_in_8bit", is_int8},
      {"bnb_4bit_compute_dtype", compute_dtype},
      {"bnb_4bit_quant_storage", dtype_name(storage)},
      {"bnb_4bit_quant_type", is_int8 ? "fp4" : quant_kind_name(kind)},
      {"bnb_4bit_use_double_quant", double_quant},
      {"llm_int8_enable_fp32_cpu_offload", false},
      {"llm_int8_has_fp16_weight", false},
      {"llm_int8_skip_modules", skip},
      {"llm_int8_threshold", int8_threshold},
      {"load_in_4bit", !is_int8},
      {"load_in_8bit", is_int8},
      {"quant_method", "bitsandbytes"},
  };
  if (source.is_object()) {
    for (const JsonMember& member : source.items()) {
      const bool known = std::any_of(members.begin(), members.end(),
                                     [&](const JsonMember& m) { return m.key == member.key; });
      if (!known) members.push_back(member);
    }
  }
  std::sort(members.begin(), members.end(),
            [](const JsonMember& a, const JsonMember& b) { return a.key < b.key; });
  return members;
}

Json with_quantization(const Json& config, const std::optional<QuantizationConfig>& quantization) {
  Json::Object members = config.items();
  std::erase_if(members, [](const JsonMember& member) { return member.key == kKey; });
  if (quantization) {
    const auto after = std::find_if(members.begin(), members.end(),
                                    [](const JsonMember& member) { return member.key > kKey; });
    members.insert(after, {std::string(kKey), quantization->to_json()});
  }
  return members;
}

}  // namespace fsdp::io
