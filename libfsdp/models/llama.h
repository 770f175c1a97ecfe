// The Llama family as ordinary torch::nn modules, with the parameter names of Hugging Face's files.
//
// Legend of shapes: N tokens of the call (documents end to end, no padding), D hidden_size, H
// heads, G KV heads, d head_dim, V vocabulary, P tokens of a prefix (undefined = none).
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "libfsdp/lora/prompt_target.h"
#include "libfsdp/models/attention.h"
#include "libfsdp/models/batch.h"
#include "libfsdp/models/config.h"
#include "libfsdp/models/kv_cache.h"
#include "libfsdp/models/layers.h"
#include "libfsdp/models/rope.h"
#include "libfsdp/shard/unit.h"

namespace fsdp::models {

class LlamaAttentionImpl : public torch::nn::Module, public lora::AdaptionTarget {
 public:
  LlamaAttentionImpl(const LlamaConfig& config, int64_t layer, const at::TensorOptions& options);
  /// Of norm(hidden). prefix [2, P, G d].
  at::Tensor forward(const at::Tensor& hidden, const RmsNorm& norm, const at::Tensor& cos,
                     const at::Tensor& sin, std::shared_ptr<const AttentionSpans> spans,
                     const at::Tensor& prefix = {});

  int64_t hidden_size() const override { return q_proj->weight.size(1); }
  void set_adaption(lora::AdaptionPrompt prompt) override;

  Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr};
  RmsNorm q_norm{nullptr}, k_norm{nullptr};  ///< Qwen3 only.

 private:
  int64_t layer_;
  AttentionShape shape_;
  lora::AdaptionPrompt adaption_;
};
TORCH_MODULE(LlamaAttention);

class LlamaMlpImpl : public torch::nn::Module {
 public:
  LlamaMlpImpl(const LlamaConfig& config, const at::TensorOptions& options);
  /// Of norm(hidden).
  at::Tensor forward(const at::Tensor& hidden, const RmsNorm& norm);

  Linear gate_proj{nullptr}, up_proj{nullptr}, down_proj{nullptr};
};
TORCH_MODULE(LlamaMlp);

/// One transformer block. It is a unit of sharding: outside of one, it is just a module.
class LlamaDecoderLayerImpl : public torch::nn::Module {
 public:
  LlamaDecoderLayerImpl(const LlamaConfig& config, int64_t layer, const at::TensorOptions& options);

  /// hidden [N, D] -> [N, D]; cos and sin fp32 [N, d / 2], prefix [2, P, G d].
  at::Tensor forward(const at::Tensor& hidden, const at::Tensor& cos, const at::Tensor& sin,
                     std::shared_ptr<const AttentionSpans> spans, const at::Tensor& prefix = {});

  LlamaAttention self_attn{nullptr};
  LlamaMlp mlp{nullptr};
  RmsNorm input_layernorm{nullptr}, post_attention_layernorm{nullptr};
};
TORCH_MODULE(LlamaDecoderLayer);

using LlamaLayerUnit = Unit<LlamaDecoderLayer>;

/// Everything below the vocabulary projection ("model." in the files).
class LlamaModelImpl : public torch::nn::Module, public lora::PrefixTarget {
 public:
  LlamaModelImpl(const LlamaConfig& config, const at::TensorOptions& options);

  /// -> hidden states after the last norm, [N, D].
  at::Tensor forward(const at::Tensor& input_ids, const at::Tensor& position_ids,
                     std::shared_ptr<const AttentionSpans> spans);
  /// Puts the prefix into an empty cache, as its first tokens.
  void begin_cache(KvCache& cache) const;

  lora::PrefixShape prefix_shape() const override { return prefix_shape_; }
  void set_prefix(lora::Prefix prefix) override { prefix_ = std::move(prefix); }
  /// 0 = there is none.
  int64_t prefix_tokens() const { return prefix_.tokens; }

  Embedding embed_tokens{nullptr};
  RmsNorm norm{nullptr};

 private:
  /// [2, P, G d] of each layer.
  std::vector<at::Tensor> make_prefixes() const;

  std::vector<LlamaLayerUnit> layers_;
  RopeTable rope_;
  lora::PrefixShape prefix_shape_;
  lora::Prefix prefix_;
};
TORCH_MODULE(LlamaModel);

/// A causal language model of the family. All parameters are built with `options` (dtype, device;
/// meta allocates nothing); values are undefined until a checkpoint or `random_init` fills them. No
/// buffers.
class LlamaForCausalLMImpl : public torch::nn::Module {
 public:
  explicit LlamaForCausalLMImpl(const LlamaConfig& config, const at::TensorOptions& options = {});

  /// Sum of the token losses over batch.loss_rows: fp32, 0-d. The logits are never stored whole.
  at::Tensor loss(const CausalLmBatch& batch);

  /// input_ids int64 [B, T], every row one document (padding on the right is harmless) -> logits
  /// [B, T, V].
  at::Tensor logits(const at::Tensor& input_ids);
  at::Tensor forward(const at::Tensor& input_ids) { return logits(input_ids); }

  /// Generation: appends int64 [n] tokens to the cache -> logits of the last of them, fp32 [V].
  /// Without gradients. A prefix takes model->prefix_tokens() of the cache's room.
  at::Tensor forward_cached(const at::Tensor& input_ids, const std::shared_ptr<KvCache>& cache);

  const LlamaConfig& config() const { return config_; }

  LlamaModel model{nullptr};
  Linear lm_head{nullptr};  ///< Absent when the embedding is tied.

 private:
  const at::Tensor& head_weight() const;
  at::Tensor head(const at::Tensor& hidden);
  void check_input(const at::Tensor& input_ids, int64_t longest) const;

  LlamaConfig config_;
};
TORCH_MODULE(LlamaForCausalLM);

}  // namespace fsdp::models
