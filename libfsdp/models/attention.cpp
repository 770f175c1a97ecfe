#include "libfsdp/models/attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "libfsdp/models/attention_cpu.h"
#include "libfsdp/models/cpu_data.h"
#include "libfsdp/models/heads.h"
#include "libfsdp/models/kv_cache.h"
#include "libfsdp/models/prefix_attention.h"

namespace fsdp::models {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::vector<int64_t> bounds_of(const AttentionSpans& spans) {
  std::vector<int64_t> bounds{0};
  for (const Span& span : spans.spans) bounds.push_back(span.end);
  return bounds;
}

class CausalAttention : public torch::autograd::Function<CausalAttention> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& cos, const Tensor& sin, std::vector<int64_t> bounds,
                        const AttentionShape& shape, const std::optional<Tensor>& prefix) {
    const AttentionInputs inputs{q.contiguous(),    k.contiguous(), v.contiguous(), cos, sin,
                                 std::move(bounds), shape};
    AttentionResult result = attention_cpu_forward(inputs);
    if (prefix) join_prefix(inputs, *prefix, result);
    ctx->save_for_backward({inputs.q, inputs.k, inputs.v, cos, sin, result.out, result.log_sum,
                            prefix.value_or(Tensor())});
    ctx->saved_data["bounds"] = inputs.bounds;
    ctx->saved_data["shape"] =
        std::vector<int64_t>{shape.num_heads, shape.num_kv_heads, shape.head_dim};
    return result.out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> shape = ctx->saved_data["shape"].toIntVector();
    const AttentionInputs inputs{saved[0],
                                 saved[1],
                                 saved[2],
                                 saved[3],
                                 saved[4],
                                 ctx->saved_data["bounds"].toIntVector(),
                                 {shape[0], shape[1], shape[2]}};
    const AttentionResult attended{saved[5], saved[6]};
    const Tensor dout = grads[0].contiguous(), prefix = saved[7];
    AttentionGrads result = attention_cpu_backward(inputs, attended, dout);
    Tensor d_prefix;
    if (prefix.defined()) d_prefix = prefix_backward(inputs, prefix, attended, dout, result);
    return {result.q, result.k, result.v, Tensor(), Tensor(), Tensor(), Tensor(), d_prefix};
  }
};

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
              bool causal) {
  return join_heads(at::scaled_dot_product_attention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0),
                                                     mask, 0.0, causal, std::nullopt,
                                                     q.size(0) != k.size(0))
                        .squeeze(0));
}

// prefix_k and prefix_v [G, P, d], or undefined.
Tensor composed_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                          const AttentionSpans& spans, const Tensor& prefix_k,
                          const Tensor& prefix_v) {
  std::vector<Tensor> parts;
  for (const Span& span : spans.spans) {
    const int64_t n = span.end - span.begin;
    const Tensor own_q = q.narrow(1, span.begin, n), own_k = k.narrow(1, span.begin, n),
                 own_v = v.narrow(1, span.begin, n);
    if (!prefix_k.defined()) {
      parts.push_back(attend(own_q, own_k, own_v, {}, true));
      continue;
    }
    const int64_t before = prefix_k.size(1);
    const Tensor mask =
        at::ones({n, before + n}, q.options().dtype(at::kBool).requires_grad(false)).tril(before);
    parts.push_back(
        attend(own_q, at::cat({prefix_k, own_k}, 1), at::cat({prefix_v, own_v}, 1), mask, false));
  }
  return parts.size() == 1 ? parts[0] : at::cat(parts, 0);
}

}  // namespace

Tensor causal_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                        const Tensor& sin, const AttentionSpans& spans, const AttentionShape& shape,
                        const Tensor& prefix) {
  if (on_fused_cpu(q)) {
    return CausalAttention::apply(q, k, v, cos, sin, bounds_of(spans), shape,
                                  prefix.defined() ? std::optional<Tensor>(prefix) : std::nullopt);
  }
  Tensor prefix_k, prefix_v;
  if (prefix.defined()) {
    prefix_k = split_heads(prefix[0], shape.num_kv_heads);
    prefix_v = split_heads(prefix[1], shape.num_kv_heads);
  }
  return composed_attention(rotate(split_heads(q, shape.num_heads), cos, sin),
                            rotate(split_heads(k, shape.num_kv_heads), cos, sin),
                            split_heads(v, shape.num_kv_heads), spans, prefix_k, prefix_v);
}

Tensor cached_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                        const Tensor& sin, KvCache& cache, int64_t layer, int64_t begin,
                        const AttentionShape& shape) {
  const int64_t tokens = q.size(0), total = begin + tokens;
  Tensor &keys = cache.keys(layer), &values = cache.values(layer);
  if (on_fused_cpu(q)) {
    const AttentionInputs inputs{q.contiguous(), k.contiguous(), v.contiguous(), cos, sin,
                                 {0, tokens},    shape};
    return attention_cpu_cached(inputs, keys, values, begin);
  }
  keys.narrow(1, begin, tokens).copy_(rotate(split_heads(k, shape.num_kv_heads), cos, sin));
  values.narrow(1, begin, tokens).copy_(split_heads(v, shape.num_kv_heads));
  std::optional<Tensor> mask;
  if (tokens > 1) mask = at::ones({tokens, total}, q.options().dtype(at::kBool)).tril(begin);
  return attend(rotate(split_heads(q, shape.num_heads), cos, sin), keys.narrow(1, 0, total),
                values.narrow(1, 0, total), mask, false);
}

}  // namespace fsdp::models
