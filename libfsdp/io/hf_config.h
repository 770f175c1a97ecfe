// config.json of the Llama family: llama, mistral, qwen2, qwen3, as transformers 4 and 5 write it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/io/hf_weights.h"
#include "libfsdp/io/json.h"
#include "libfsdp/io/quantization_config.h"

namespace fsdp::io {

/// How rotary frequencies are stretched. inv_i = theta^(-2i / head_dim).
struct RopeConfig {
  enum class Type : uint8_t { kDefault, kLinear, kLlama3 };
  Type type = Type::kDefault;
  double theta = 10000.0;
  double factor = 1.0;            ///< linear: inv / factor; llama3: the same for long waves.
  double low_freq_factor = 1.0;   ///< llama3: waves longer than original / low are long.
  double high_freq_factor = 4.0;  ///< llama3: waves shorter than original / high stay as they are.
  int64_t original_max_position_embeddings = 8192;
};

/// What a model of the family is made of, checked and bounded: every product of its sizes fits in
/// 64 bits.
struct HfModelConfig {
  std::string model_type;  ///< "llama", "mistral", "qwen2" or "qwen3".
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  double initializer_range = 0.02;
  double attention_dropout = 0.0;
  RopeConfig rope;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;  ///< q_proj, k_proj and v_proj have a bias.
  bool o_bias = false;    ///< o_proj has a bias.
  bool mlp_bias = false;
  bool qk_norm = false;                   ///< RMS norm of each head of q and k before the rotation.
  std::optional<int64_t> sliding_window;  ///< Tokens that some layer can look back; empty: all.
  std::optional<int64_t> bos_token_id;
  std::vector<int64_t> eos_token_ids;
  std::optional<int64_t> pad_token_id;
  std::optional<DType> dtype;                      ///< Of the stored weights, as the file claims.
  std::optional<QuantizationConfig> quantization;  ///< Of weights that the files hold quantised.
  Json source;                                     ///< The document itself, for to_json().

  /// Reads config.json of a model directory. Throws: ModelError naming file, key, value and what
  /// was expected; for another model type, activation or rope type it names the ones that are
  /// known.
  static HfModelConfig read(const std::string& directory);

  /// The same from a document; `where` starts every message.
  static HfModelConfig from_json(const Json& document, const std::string& where);

  /// The source document with rope parameters and dtype in both spellings, so that transformers 4
  /// and 5 read it; everything else is kept.
  Json to_json(DType dtype) const;

  /// The same model with weights that are not quantised.
  HfModelConfig dequantized() const;

  /// Names and shapes of all tensors, in the order of transformers' state dict; no lm_head.weight
  /// when tied. Of quantised weights too: their shapes before they were quantised.
  std::vector<NamedShape> expected_tensors() const;

  /// Throws ConfigError when a sequence of `length` tokens would need the sliding window, which is
  /// not computed.
  void check_context(int64_t length) const;
};

}  // namespace fsdp::io
