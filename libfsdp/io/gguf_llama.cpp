#include "libfsdp/io/gguf_llama.h"

#include <algorithm>
#include <array>
#include <set>
#include <utility>

#include "libfsdp/base/error.h"

namespace fsdp::io {
namespace {

constexpr std::array<std::pair<std::string_view, std::string_view>, 3> kTopNames = {
    {{"model.embed_tokens", "token_embd"}, {"model.norm", "output_norm"}, {"lm_head", "output"}}};
constexpr std::array<std::pair<std::string_view, std::string_view>, 9> kLayerNames = {
    {{"self_attn.q_proj", "attn_q"},
     {"self_attn.k_proj", "attn_k"},
     {"self_attn.v_proj", "attn_v"},
     {"self_attn.o_proj", "attn_output"},
     {"mlp.gate_proj", "ffn_gate"},
     {"mlp.up_proj", "ffn_up"},
     {"mlp.down_proj", "ffn_down"},
     {"input_layernorm", "attn_norm"},
     {"post_attention_layernorm", "ffn_norm"}}};

void copy_key(const Json& metadata, const char* from, Json& document, const char* to) {
  if (const Json* value = metadata.find(from)) document[to] = *value;
}

Json rope_document(const GgufFile& file) {
  const Json& metadata = file.metadata();
  if (file.find("rope_freqs.weight") != nullptr) {
    throw ModelError(
        "rotary scaling in the tensor rope_freqs.weight is not supported. Hint: use the model's "
        "safetensors files.");
  }
  const std::string type = metadata.get("llama.rope.scaling.type", "none");
  const double factor = metadata.get<double>("llama.rope.scaling.factor", 1.0);
  if (type == "none" || factor == 1.0) return Json();
  return Json::object({{"rope_type", type}, {"factor", factor}});
}

/// config.json of the model, from metadata and the presence of tensors.
Json config_document(const GgufFile& file) {
  const Json& metadata = file.metadata();
  const std::string architecture = metadata.get<std::string>("general.architecture");
  if (architecture != "llama") {
    throw ModelError(cat("architecture '", architecture, "' is not supported, expected llama"));
  }
  const GgufTensor* embedding = file.find("token_embd.weight");
  if (embedding == nullptr || embedding->shape.size() != 2) {
    throw ModelError("tensor token_embd.weight is missing or no matrix");
  }
  Json document =
      Json::object({{"architectures", Json::array({"LlamaForCausalLM"})}, {"model_type", "llama"}});
  document["vocab_size"] = embedding->shape[0];
  copy_key(metadata, "llama.embedding_length", document, "hidden_size");
  copy_key(metadata, "llama.feed_forward_length", document, "intermediate_size");
  copy_key(metadata, "llama.block_count", document, "num_hidden_layers");
  copy_key(metadata, "llama.attention.head_count", document, "num_attention_heads");
  document["num_key_value_heads"] = document["num_attention_heads"];
  copy_key(metadata, "llama.attention.head_count_kv", document, "num_key_value_heads");
  copy_key(metadata, "llama.rope.dimension_count", document, "head_dim");
  copy_key(metadata, "llama.attention.key_length", document, "head_dim");
  copy_key(metadata, "llama.context_length", document, "max_position_embeddings");
  copy_key(metadata, "llama.attention.layer_norm_rms_epsilon", document, "rms_norm_eps");
  document["rope_theta"] = metadata.get<double>("llama.rope.freq_base", 10000.0);
  document["rope_scaling"] = rope_document(file);
  document["hidden_act"] = "silu";
  document["initializer_range"] = 0.02;
  document["attention_bias"] = file.find("blk.0.attn_q.bias") != nullptr;
  document["attention_dropout"] = 0.0;
  document["mlp_bias"] = file.find("blk.0.ffn_up.bias") != nullptr;
  document["tie_word_embeddings"] = file.find("output.weight") == nullptr;
  copy_key(metadata, "tokenizer.ggml.bos_token_id", document, "bos_token_id");
  copy_key(metadata, "tokenizer.ggml.eos_token_id", document, "eos_token_id");
  copy_key(metadata, "tokenizer.ggml.padding_token_id", document, "pad_token_id");
  document["use_cache"] = true;
  return document;
}

}  // namespace

std::string gguf_name(const std::string& hf_name) {
  const size_t dot = hf_name.rfind('.');
  const std::string_view base = std::string_view(hf_name).substr(0, dot);
  const std::string_view suffix = std::string_view(hf_name).substr(std::min(dot, hf_name.size()));
  for (const auto& [hf, gguf] : kTopNames) {
    if (base == hf) return cat(gguf, suffix);
  }
  constexpr std::string_view kLayers = "model.layers.";
  const size_t end = base.find('.', kLayers.size());
  if (base.starts_with(kLayers) && end != std::string_view::npos) {
    for (const auto& [hf, gguf] : kLayerNames) {
      if (base.substr(end + 1) == hf) {
        return cat("blk.", base.substr(kLayers.size(), end - kLayers.size()), ".", gguf, suffix);
      }
    }
  }
  throw InternalError(cat("GGUF has no name for ", hf_name));
}

GgufLlama GgufLlama::open(const std::string& path) {
  GgufFile file = GgufFile::open(path);
  try {
    HfModelConfig config = HfModelConfig::from_json(config_document(file), "metadata");
    GgufLlama model(std::move(file), std::move(config));
    model.check_tensors();
    return model;
  } catch (const ModelError& error) {
    throw ModelError(cat(path, ": ", error.what()));
  }
}

void GgufLlama::check_tensors() const {
  std::set<std::string> known;
  for (const NamedShape& expected : config_.expected_tensors()) {
    const std::string name = gguf_name(expected.name);
    const GgufTensor* tensor = file_.find(name);
    if (tensor == nullptr) throw ModelError(cat("tensor ", name, " is missing"));
    if (tensor->shape != expected.shape) {
      throw ModelError(cat("tensor ", name, " has shape ", shape_text(tensor->shape), ", expected ",
                           shape_text(expected.shape)));
    }
    known.insert(name);
  }
  for (const GgufTensor& tensor : file_.tensors()) {
    if (!known.contains(tensor.name))
      throw ModelError(cat("tensor ", tensor.name, " has no place in a Llama model"));
  }
}

Json GgufLlama::generation_config() const {
  Json document = Json::object({{"_from_model_config", true}});
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
    copy_key(config_.source, key, document, key);
  return document;
}

void GgufLlama::read(const std::string& hf_name, int64_t at, std::span<float> out) const {
  const GgufTensor* tensor = file_.find(gguf_name(hf_name));
  check(tensor != nullptr, cat("the GGUF file has no ", hf_name));
  if (hf_name.find(".q_proj.") != std::string::npos ||
      hf_name.find(".k_proj.") != std::string::npos) {
    return read_interleaved(*tensor, at, out);
  }
  file_.read(*tensor, at, out);
}

/// llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head: row 2j + s there is
/// row s * dim/2 + j here.
void GgufLlama::read_interleaved(const GgufTensor& tensor, int64_t at, std::span<float> out) const {
  const int64_t head_dim = config_.head_dim;
  const int64_t row_numel = tensor.numel / tensor.shape[0];  // 1 for a bias.
  while (!out.empty()) {
    const int64_t row = at / row_numel, column = at % row_numel;
    const int64_t in_head = row % head_dim;
    const int64_t theirs = row - in_head + in_head % (head_dim / 2) * 2 + in_head / (head_dim / 2);
    const auto numel = std::min(row_numel - column, static_cast<int64_t>(out.size()));
    file_.read(tensor, theirs * row_numel + column, out.first(static_cast<size_t>(numel)));
    out = out.subspan(static_cast<size_t>(numel));
    at += numel;
  }
}

}  // namespace fsdp::io
