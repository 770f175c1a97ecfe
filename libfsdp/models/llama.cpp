#include "libfsdp/models/llama.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/linear.h>

#include <algorithm>
#include <tuple>

#include "libfsdp/base/error.h"
#include "libfsdp/models/functions.h"
#include "libfsdp/models/heads.h"
#include "libfsdp/models/loss.h"
#include "libfsdp/models/prefix_attention.h"
#include "libfsdp/shard/weight_adapter.h"

namespace fsdp::models {

using at::Tensor;
using Spans = std::shared_ptr<const AttentionSpans>;

LlamaAttentionImpl::LlamaAttentionImpl(const LlamaConfig& c, int64_t layer,
                                       const at::TensorOptions& options)
    : layer_(layer), shape_{c.num_attention_heads, c.num_key_value_heads, c.head_dim} {
  const int64_t q = shape_.num_heads * c.head_dim, kv = shape_.num_kv_heads * c.head_dim;
  q_proj = register_module("q_proj", Linear(c.hidden_size, q, c.qkv_bias, options));
  k_proj = register_module("k_proj", Linear(c.hidden_size, kv, c.qkv_bias, options));
  v_proj = register_module("v_proj", Linear(c.hidden_size, kv, c.qkv_bias, options));
  o_proj = register_module("o_proj", Linear(q, c.hidden_size, c.o_bias, options));
  if (c.qk_norm) {
    q_norm = register_module("q_norm", RmsNorm(c.head_dim, c.rms_norm_eps, options));
    k_norm = register_module("k_norm", RmsNorm(c.head_dim, c.rms_norm_eps, options));
  }
}

Tensor LlamaAttentionImpl::forward(const Tensor& hidden, const RmsNorm& norm, const Tensor& cos,
                                   const Tensor& sin, Spans spans, const Tensor& prefix) {
  const std::vector<Tensor> qkv = norm_linears(hidden, norm, {q_proj, k_proj, v_proj});
  Tensor q = qkv[0], k = qkv[1];
  const Tensor& v = qkv[2];
  if (q_norm) {
    q = q_norm->forward(q.view({-1, shape_.head_dim})).view_as(q);
    k = k_norm->forward(k.view({-1, shape_.head_dim})).view_as(k);
  }
  const Tensor attended = spans->cache
                              ? cached_attention(q, k, v, cos, sin, *spans->cache, layer_,
                                                 spans->cache->length() - hidden.size(0), shape_)
                              : causal_attention(q, k, v, cos, sin, *spans, shape_, prefix);
  if (!adaption_.tokens.defined()) return o_proj->forward(attended);
  const Tensor tokens = adaption_.tokens.squeeze(0);
  const Tensor beside =
      prompt_attention(q, k_proj->forward(tokens), v_proj->forward(tokens), cos, sin, shape_);
  return o_proj->forward(attended + adaption_.gate * beside);
}

void LlamaAttentionImpl::set_adaption(lora::AdaptionPrompt prompt) {
  if (q_norm || o_proj->bias.defined()) {
    throw ConfigError(
        "llama-adapter needs attention without norms of q and k and without a bias of o_proj, as "
        "Llama's and Mistral's is. Hint: LoRA or prefix tuning.");
  }
  adaption_ = std::move(prompt);
}

LlamaMlpImpl::LlamaMlpImpl(const LlamaConfig& c, const at::TensorOptions& options) {
  gate_proj =
      register_module("gate_proj", Linear(c.hidden_size, c.intermediate_size, c.mlp_bias, options));
  up_proj =
      register_module("up_proj", Linear(c.hidden_size, c.intermediate_size, c.mlp_bias, options));
  down_proj =
      register_module("down_proj", Linear(c.intermediate_size, c.hidden_size, c.mlp_bias, options));
}

Tensor LlamaMlpImpl::forward(const Tensor& hidden, const RmsNorm& norm) {
  const std::vector<Tensor> gate_up = norm_linears(hidden, norm, {gate_proj, up_proj});
  return swiglu_linear(gate_up[0], gate_up[1], down_proj->weight, down_proj->bias);
}

LlamaDecoderLayerImpl::LlamaDecoderLayerImpl(const LlamaConfig& c, int64_t layer,
                                             const at::TensorOptions& options) {
  self_attn = register_module("self_attn", LlamaAttention(c, layer, options));
  mlp = register_module("mlp", LlamaMlp(c, options));
  input_layernorm =
      register_module("input_layernorm", RmsNorm(c.hidden_size, c.rms_norm_eps, options));
  post_attention_layernorm =
      register_module("post_attention_layernorm", RmsNorm(c.hidden_size, c.rms_norm_eps, options));
}

Tensor LlamaDecoderLayerImpl::forward(const Tensor& hidden, const Tensor& cos, const Tensor& sin,
                                      Spans spans, const Tensor& prefix) {
  const Tensor middle =
      hidden + self_attn->forward(hidden, input_layernorm, cos, sin, spans, prefix);
  return middle + mlp->forward(middle, post_attention_layernorm);
}

LlamaModelImpl::LlamaModelImpl(const LlamaConfig& c, const at::TensorOptions& options)
    : rope_(c.rope, c.head_dim),
      prefix_shape_{c.num_hidden_layers, c.num_key_value_heads, c.head_dim} {
  embed_tokens = register_module(
      "embed_tokens", Embedding(c.vocab_size, c.hidden_size, c.tie_word_embeddings, options));
  auto list = register_module("layers", torch::nn::ModuleList());
  for (int64_t i = 0; i < c.num_hidden_layers; ++i) {
    layers_.push_back(LlamaLayerUnit(c, i, options));
    list->push_back(layers_.back().ptr());
  }
  norm = register_module("norm", RmsNorm(c.hidden_size, c.rms_norm_eps, options));
}

std::vector<Tensor> LlamaModelImpl::make_prefixes() const {
  const auto& [layers, kv_heads, head_dim] = prefix_shape_;
  return prefix_.make()
      .view({prefix_.tokens, layers, 2, kv_heads * head_dim})
      .permute({1, 2, 0, 3})
      .contiguous()
      .unbind();
}

void LlamaModelImpl::begin_cache(KvCache& cache) const {
  if (prefix_.tokens == 0 || cache.length() > 0) return;
  const int64_t begin = cache.append(prefix_.tokens);
  const std::vector<Tensor> prefixes = make_prefixes();
  for (size_t l = 0; l < prefixes.size(); ++l) {
    const auto layer = static_cast<int64_t>(l);
    const auto store = [&](Tensor& to, const Tensor& from) {
      to.narrow(1, begin, prefix_.tokens).copy_(split_heads(from, prefix_shape_.kv_heads));
    };
    store(cache.keys(layer), prefixes[l][0]);
    store(cache.values(layer), prefixes[l][1]);
  }
}

Tensor LlamaModelImpl::forward(const Tensor& input_ids, const Tensor& position_ids, Spans spans) {
  const bool prefixed = prefix_.tokens > 0 && !spans->cache;  // A cache holds it already.
  const std::vector<Tensor> prefixes =
      prefixed ? make_prefixes() : std::vector<Tensor>(layers_.size());
  const auto [cos, sin] = rope_.lookup(prefixed ? position_ids + prefix_.tokens : position_ids);
  Tensor hidden = embed_tokens->forward(input_ids);
  for (size_t l = 0; l < layers_.size(); ++l)
    hidden = layers_[l]->forward(hidden, cos, sin, spans, prefixes[l]);
  return norm->forward(hidden);
}

LlamaForCausalLMImpl::LlamaForCausalLMImpl(const LlamaConfig& config,
                                           const at::TensorOptions& options)
    : config_(config) {
  validate(config_);
  model = register_module("model", LlamaModel(config_, options));
  if (!config_.tie_word_embeddings) {
    lm_head =
        register_module("lm_head", Linear(config_.hidden_size, config_.vocab_size, false, options));
  }
}

const Tensor& LlamaForCausalLMImpl::head_weight() const {
  return lm_head ? lm_head->weight : model->embed_tokens->weight;
}

// An adapter of the embedding is not the head's, even where the two share their weight.
Tensor LlamaForCausalLMImpl::head(const Tensor& hidden) {
  return lm_head ? lm_head->forward(hidden) : at::linear(hidden, head_weight());
}

void LlamaForCausalLMImpl::check_input(const Tensor& input_ids, int64_t longest) const {
  if (input_ids.numel() == 0) throw DataError("model: a batch without tokens");
  config_.check_context(longest);
  if (!input_ids.device().is_cpu()) return;
  const auto [least, most] = at::aminmax(input_ids);
  if (least.item<int64_t>() < 0 || most.item<int64_t>() >= config_.vocab_size) {
    throw DataError(cat("model: token ids run from ", least.item<int64_t>(), " to ",
                        most.item<int64_t>(), ", the vocabulary has ", config_.vocab_size,
                        ". Hint: does the tokenizer belong to this model?"));
  }
}

Tensor LlamaForCausalLMImpl::loss(const CausalLmBatch& batch) {
  int64_t longest = 0;
  for (const Span& span : batch.spans->spans) longest = std::max(longest, span.end - span.begin);
  check_input(batch.input_ids, longest + model->prefix_tokens());
  const Tensor hidden = model->forward(batch.input_ids, batch.position_ids, batch.spans);
  if (lm_head && weight_adapter(lm_head->weight))
    return cross_entropy_sum(head(hidden.index_select(0, batch.loss_rows)), batch.loss_targets);
  return linear_cross_entropy(hidden, head_weight(), batch.loss_rows, batch.loss_targets);
}

Tensor LlamaForCausalLMImpl::logits(const Tensor& input_ids) {
  check_input(input_ids, input_ids.size(1) + model->prefix_tokens());
  const CausalLmBatch batch = make_batch(input_ids, input_ids);
  const Tensor hidden = model->forward(batch.input_ids, batch.position_ids, batch.spans);
  return head(hidden).view({input_ids.size(0), input_ids.size(1), -1});
}

Tensor LlamaForCausalLMImpl::forward_cached(const Tensor& input_ids,
                                            const std::shared_ptr<KvCache>& cache) {
  const at::NoGradGuard no_grad;
  model->begin_cache(*cache);
  const int64_t count = input_ids.numel(), begin = cache->length();
  check_input(input_ids, begin + count);
  cache->append(count);
  auto spans = std::make_shared<AttentionSpans>();
  spans->spans.push_back({0, count});
  spans->cache = cache;
  const Tensor positions = at::arange(begin, begin + count, input_ids.options());
  const Tensor hidden = model->forward(input_ids, positions, spans);
  return head(hidden.narrow(0, count - 1, 1)).squeeze(0).to(at::kFloat);
}

}  // namespace fsdp::models
