#include "libfsdp/io/hf_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <initializer_list>
#include <limits>

namespace fsdp::io {
namespace {

constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxWidth = 1 << 20;  // hidden, intermediate, heads * head_dim
constexpr int64_t kMaxLayers = 1 << 14;
constexpr int64_t kMaxHeads = 1 << 14;
constexpr int64_t kMaxHeadDim = 1 << 14;
constexpr int64_t kMaxPositions = int64_t{1} << 40;

/// What differs between the model types.
struct Family {
  std::string_view name;
  bool qkv_bias;         // Always there; else the file's attention_bias counts.
  bool has_bias_option;  // attention_bias is a key of this type.
  bool qk_norm;
  int64_t kv_heads;        // Default when the key is absent; 0: as many as heads.
  int64_t head_dim;        // Default; 0: hidden / heads.
  int64_t max_positions;   // Default.
  int64_t sliding_window;  // Default; 0: none.
  bool special_tokens;     // bos 1 and eos 2 when the keys are absent.
};
constexpr std::array<Family, 4> kFamilies = {{
    {"llama", false, true, false, 0, 0, 2048, 0, true},
    {"mistral", false, false, false, 8, 0, 131072, 4096, true},
    {"qwen2", true, false, false, 32, 0, 32768, 4096, false},
    {"qwen3", false, true, true, 32, 128, 32768, 4096, false},
}};

const Family& family_of(const std::string& model_type) {
  std::string known;
  for (const Family& family : kFamilies) {
    if (family.name == model_type) return family;
    known += cat(known.empty() ? "" : ", ", family.name);
  }
  throw ModelError(cat("model_type '", model_type, "' is not supported, expected one of ", known));
}

int64_t bounded(const Json& json, std::string_view key, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return value;
  const Json* spelled = json.find(key);
  throw ModelError(cat("'", key, "': got ", spelled ? spelled->dump() : std::to_string(value),
                       ", expected ", low, " to ", high));
}

int64_t size_key(const Json& json, std::string_view key, int64_t high) {
  return bounded(json, key, json.get<int64_t>(key), 1, high);
}

int64_t size_key(const Json& json, std::string_view key, int64_t high, int64_t fallback) {
  return bounded(json, key, json.get<int64_t>(key, fallback), 1, high);
}

double positive_key(const Json& json, std::string_view key, double fallback) {
  const double value = json.get<double>(key, fallback);
  if (std::isfinite(value) && value > 0) return value;
  throw ModelError(cat("'", key, "': got ", value, ", expected a positive number"));
}

double required_positive(const Json& json, std::string_view key) {
  json.get<double>(key);
  return positive_key(json, key, 0);
}

/// rope_scaling (transformers 4) wins over rope_parameters (5), as in transformers 5; the older key
/// lies beside theta.
const Json& rope_object(const Json& json) {
  static const Json none = Json::object();
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const Json* value = json.find(key);
    if (value != nullptr && !value->is_null() && !value->items().empty()) return *value;
  }
  return none;
}

void parse_llama3(const Json& object, RopeConfig& rope) {
  rope.low_freq_factor = required_positive(object, "low_freq_factor");
  rope.high_freq_factor = required_positive(object, "high_freq_factor");
  rope.original_max_position_embeddings =
      size_key(object, "original_max_position_embeddings", kMaxPositions);
  if (rope.high_freq_factor <= rope.low_freq_factor) {
    throw ModelError(cat("'high_freq_factor': got ", rope.high_freq_factor,
                         ", expected more than low_freq_factor ", rope.low_freq_factor));
  }
}

RopeConfig parse_rope(const Json& json) {
  const Json& object = rope_object(json);
  RopeConfig rope;
  const Json* newer = json.find("rope_parameters");
  const Json* holder = object.contains("rope_theta")                     ? &object
                       : json.contains("rope_theta") || newer == nullptr ? &json
                                                                         : newer;
  rope.theta = positive_key(*holder, "rope_theta", 10000.0);
  const double rotated =
      object.get<double>("partial_rotary_factor", json.get<double>("partial_rotary_factor", 1.0));
  if (rotated != 1.0) throw ModelError("'partial_rotary_factor': only 1 is supported");
  const std::string type = object.get("rope_type", object.get("type", "default").c_str());
  if (type == "default") return rope;
  rope.factor = required_positive(object, "factor");
  if (type == "linear") {
    rope.type = RopeConfig::Type::kLinear;
  } else if (type == "llama3") {
    rope.type = RopeConfig::Type::kLlama3;
    parse_llama3(object, rope);
  } else {
    throw ModelError(
        cat("rope type '", type, "' is not supported, expected default, linear or llama3"));
  }
  return rope;
}

/// Tokens that a layer can look back, if any layer is limited.
std::optional<int64_t> parse_sliding_window(const Json& json, const Family& family) {
  bool limited = family.sliding_window > 0;
  if (family.name == "qwen2" || family.name == "qwen3") {
    limited = json.get<bool>("use_sliding_window", false);
  }
  if (const Json* types = json.find("layer_types"); types != nullptr && !types->is_null()) {
    bool any = false;
    for (const Json& type : types->elements()) {
      any |= type.as_string() == "sliding_attention";
      if (type.as_string() == "full_attention" || type.as_string() == "sliding_attention") continue;
      throw ModelError(cat("'layer_types': ", type.dump(), " is not supported"));
    }
    limited = limited && any;
  }
  const Json* window = json.find("sliding_window");
  if (!limited || (window != nullptr && window->is_null())) return std::nullopt;
  return size_key(json, "sliding_window", kMaxPositions, family.sliding_window);
}

/// One id, a list of ids, or null.
std::vector<int64_t> parse_token_ids(const Json& json, std::string_view key,
                                     std::vector<int64_t> fallback) {
  const Json* value = json.find(key);
  if (value == nullptr) return fallback;
  if (value->is_null()) return {};
  std::vector<int64_t> ids =
      value->is_array() ? json.get<std::vector<int64_t>>(key) : std::vector{json.get<int64_t>(key)};
  // Some files say -1 for "there is none".
  std::erase_if(ids, [](int64_t id) { return id == -1; });
  for (const int64_t id : ids) bounded(json, key, id, 0, kMaxVocab);
  return ids;
}

std::optional<int64_t> parse_token_id(const Json& json, std::string_view key,
                                      std::vector<int64_t> fallback) {
  const auto ids = parse_token_ids(json, key, std::move(fallback));
  return ids.empty() ? std::nullopt : std::optional(ids.front());
}

std::optional<DType> parse_dtype(const Json& json) {
  std::string name = json.get("dtype", json.get("torch_dtype", "").c_str());
  if (name.starts_with("torch.")) name.erase(0, 6);
  if (name.empty() || name == "auto") return std::nullopt;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
    if (dtype_name(dtype) == name) return dtype;
  }
  throw ModelError(
      cat("'dtype': got '", name, "', expected float32, bfloat16, float16 or float64"));
}

void refuse_unsupported(const Json& json) {
  const std::string activation = json.get("hidden_act", "silu");
  if (activation != "silu") {
    throw ModelError(cat("'hidden_act': '", activation, "' is not supported, expected silu"));
  }
}

void parse_heads(const Json& json, const Family& family, HfModelConfig& config) {
  config.num_attention_heads = size_key(json, "num_attention_heads", kMaxHeads);
  const bool has_kv = json.contains("num_key_value_heads") || family.kv_heads == 0;
  config.num_key_value_heads = size_key(json, "num_key_value_heads", kMaxHeads,
                                        has_kv ? config.num_attention_heads : family.kv_heads);
  if (config.num_attention_heads % config.num_key_value_heads != 0) {
    throw ModelError(cat("'num_key_value_heads': ", config.num_key_value_heads,
                         " does not divide num_attention_heads ", config.num_attention_heads));
  }
  const bool has_dim = json.contains("head_dim") && !json["head_dim"].is_null();
  if (!has_dim && family.head_dim == 0 && config.hidden_size % config.num_attention_heads != 0) {
    throw ModelError(cat("'hidden_size': ", config.hidden_size,
                         " is not a multiple of num_attention_heads ", config.num_attention_heads,
                         ", and there is no head_dim"));
  }
  const int64_t fallback =
      family.head_dim > 0 ? family.head_dim : config.hidden_size / config.num_attention_heads;
  config.head_dim = size_key(json, "head_dim", kMaxHeadDim, std::max<int64_t>(fallback, 1));
  if (config.head_dim % 2 != 0) {
    throw ModelError(cat("'head_dim': ", config.head_dim, " is odd, rotary embeddings need pairs"));
  }
  bounded(json, "head_dim", config.head_dim * config.num_attention_heads, 1, kMaxWidth);
}

HfModelConfig parse_config(const Json& json) {
  HfModelConfig config;
  config.model_type = json.get<std::string>("model_type");
  const Family& family = family_of(config.model_type);
  refuse_unsupported(json);
  config.vocab_size = size_key(json, "vocab_size", kMaxVocab);
  config.hidden_size = size_key(json, "hidden_size", kMaxWidth);
  config.intermediate_size = size_key(json, "intermediate_size", kMaxWidth);
  config.num_hidden_layers = size_key(json, "num_hidden_layers", kMaxLayers);
  parse_heads(json, family, config);
  config.max_position_embeddings =
      size_key(json, "max_position_embeddings", kMaxPositions, family.max_positions);
  config.rms_norm_eps = positive_key(json, "rms_norm_eps", 1e-6);
  config.initializer_range = positive_key(json, "initializer_range", 0.02);
  config.attention_dropout = json.get<double>("attention_dropout", 0.0);
  config.rope = parse_rope(json);
  config.tie_word_embeddings = json.get<bool>("tie_word_embeddings", false);
  const bool attention_bias = family.has_bias_option && json.get<bool>("attention_bias", false);
  config.qkv_bias = family.qkv_bias || attention_bias;
  config.o_bias = attention_bias;
  config.mlp_bias = family.name == "llama" && json.get<bool>("mlp_bias", false);
  config.qk_norm = family.qk_norm;
  config.sliding_window = parse_sliding_window(json, family);
  using Ids = std::vector<int64_t>;
  config.bos_token_id =
      parse_token_id(json, "bos_token_id", family.special_tokens ? Ids{1} : Ids{});
  config.eos_token_ids =
      parse_token_ids(json, "eos_token_id", family.special_tokens ? Ids{2} : Ids{});
  config.pad_token_id = parse_token_id(json, "pad_token_id", {});
  config.dtype = parse_dtype(json);
  config.source = json;
  return config;
}

Json rope_json(const RopeConfig& rope) {
  if (rope.type == RopeConfig::Type::kLinear) {
    return Json::object({{"rope_type", "linear"}, {"factor", rope.factor}});
  }
  if (rope.type == RopeConfig::Type::kLlama3) {
    return Json::object(
        {{"rope_type", "llama3"},
         {"factor", rope.factor},
         {"low_freq_factor", rope.low_freq_factor},
         {"high_freq_factor", rope.high_freq_factor},
         {"original_max_position_embeddings", rope.original_max_position_embeddings}});
  }
  return Json();
}

}  // namespace

HfModelConfig HfModelConfig::from_json(const Json& document, const std::string& where) {
  HfModelConfig config;
  try {
    config = parse_config(document);
  } catch (const ModelError& error) {
    throw ModelError(cat(where, ": ", error.what()));
  }
  config.quantization = QuantizationConfig::from_model_config(document, where);
  return config;
}

HfModelConfig HfModelConfig::read(const std::string& directory) {
  const std::string path = (std::filesystem::path(directory) / "config.json").string();
  return from_json(Json::read(path), path);
}

Json HfModelConfig::to_json(DType dtype) const {
  Json json = source;
  const Json scaling = rope_json(rope);
  Json parameters = scaling.is_null() ? Json::object({{"rope_type", "default"}}) : scaling;
  parameters["rope_theta"] = rope.theta;
  json["rope_theta"] = rope.theta;
  json["rope_scaling"] = scaling;
  json["rope_parameters"] = parameters;
  json["dtype"] = dtype_name(dtype);
  json["torch_dtype"] = dtype_name(dtype);
  return json;
}

HfModelConfig HfModelConfig::dequantized() const {
  HfModelConfig config = *this;
  config.quantization.reset();
  config.source = with_quantization(source, std::nullopt);
  return config;
}

std::vector<NamedShape> HfModelConfig::expected_tensors() const {
  std::vector<NamedShape> tensors;
  const auto linear = [&](const std::string& name, int64_t out, int64_t in, bool bias) {
    tensors.push_back({name + ".weight", {out, in}});
    if (bias) tensors.push_back({name + ".bias", {out}});
  };
  const int64_t q_width = num_attention_heads * head_dim;
  const int64_t kv_width = num_key_value_heads * head_dim;
  tensors.push_back({"model.embed_tokens.weight", {vocab_size, hidden_size}});
  for (int64_t i = 0; i < num_hidden_layers; ++i) {
    const std::string layer = cat("model.layers.", i, ".");
    linear(layer + "self_attn.q_proj", q_width, hidden_size, qkv_bias);
    linear(layer + "self_attn.k_proj", kv_width, hidden_size, qkv_bias);
    linear(layer + "self_attn.v_proj", kv_width, hidden_size, qkv_bias);
    linear(layer + "self_attn.o_proj", hidden_size, q_width, o_bias);
    if (qk_norm) {
      tensors.push_back({layer + "self_attn.q_norm.weight", {head_dim}});
      tensors.push_back({layer + "self_attn.k_norm.weight", {head_dim}});
    }
    linear(layer + "mlp.gate_proj", intermediate_size, hidden_size, mlp_bias);
    linear(layer + "mlp.up_proj", intermediate_size, hidden_size, mlp_bias);
    linear(layer + "mlp.down_proj", hidden_size, intermediate_size, mlp_bias);
    tensors.push_back({layer + "input_layernorm.weight", {hidden_size}});
    tensors.push_back({layer + "post_attention_layernorm.weight", {hidden_size}});
  }
  tensors.push_back({"model.norm.weight", {hidden_size}});
  if (!tie_word_embeddings) tensors.push_back({"lm_head.weight", {vocab_size, hidden_size}});
  return tensors;
}

void HfModelConfig::check_context(int64_t length) const {
  if (!sliding_window || length <= *sliding_window) return;
  throw ConfigError(cat("a context of ", length,
                        " tokens is longer than the model's sliding window of ", *sliding_window,
                        ", which is not supported. Hint: ask for at most ", *sliding_window, "."));
}

}  // namespace fsdp::io
