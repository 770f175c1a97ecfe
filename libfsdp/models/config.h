// What defines a model of the Llama family: Llama 2/3.x, Mistral, Qwen2/2.5 and Qwen3 are one block with flags.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fsdp::models {

/// Rotary position embedding: how the base frequencies are stretched.
struct RopeConfig {
  enum class Type { kDefault, kLinear, kLlama3 };
  Type type = Type::kDefault;
  double theta = 10000.0;
  double factor = 1.0;  ///< kLinear and kLlama3.
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  int64_t original_max_position_embeddings = 8192;
};

struct LlamaConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;  ///< Divides num_heads.
  int64_t head_dim = 0;      ///< Even; need not be hidden_size / num_heads.
  int64_t max_position_embeddings = 2048;
  int64_t sliding_window = 0;  ///< 0: none. A document longer than it is refused.
  double rms_norm_eps = 1e-6;
  RopeConfig rope;
  bool tie_word_embeddings = false;
  bool attention_bias = false;      ///< Biases of q, k and v.
  bool attention_out_bias = false;  ///< Bias of o.
  bool mlp_bias = false;
  bool qk_norm = false;  ///< RMSNorm over each head of q and k, before rope (Qwen3).

  /// Throws ModelError when sizes are not positive, heads do not divide, or head_dim is odd.
  void validate() const;
};

/// One parameter of a model: the name in Hugging Face's files, and its shape.
using NamedShape = std::pair<std::string, std::vector<int64_t>>;

/// All parameters, in the order in which LlamaForCausalLM registers them (tied embeddings appear once).
std::vector<NamedShape> parameter_shapes(const LlamaConfig& config);

}  // namespace fsdp::models
