#include "libfsdp/models/attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/csrc/autograd/custom_function.h>

#include "libfsdp/models/attention_cpu.h"
#include "libfsdp/models/cpu_data.h"
#include "libfsdp/models/kv_cache.h"

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
                        const AttentionShape& shape) {
    const AttentionInputs inputs{q.contiguous(),    k.contiguous(), v.contiguous(), cos, sin,
                                 std::move(bounds), shape};
    const AttentionResult result = attention_cpu_forward(inputs);
    ctx->save_for_backward({inputs.q, inputs.k, inputs.v, cos, sin, result.out, result.log_sum});
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
    AttentionGrads result =
        attention_cpu_backward(inputs, {saved[5], saved[6]}, grads[0].contiguous());
    return {result.q, result.k, result.v, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

/// [N, heads d] -> [heads, N, d]
Tensor split_heads(const Tensor& x, int64_t heads) {
  return x.view({x.size(0), heads, -1}).transpose(0, 1);
}

/// x [heads, N, d], cos and sin [N, d / 2]
Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const std::vector<Tensor> halves = x.chunk(2, -1);
  const Tensor c = cos.to(x.scalar_type()), s = sin.to(x.scalar_type());
  return at::cat({halves[0] * c - halves[1] * s, halves[1] * c + halves[0] * s}, -1);
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
              bool causal) {
  return at::scaled_dot_product_attention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), mask, 0.0,
                                          causal, std::nullopt, q.size(0) != k.size(0))
      .squeeze(0)
      .transpose(0, 1)
      .flatten(1);
}

Tensor composed_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                          const AttentionSpans& spans) {
  std::vector<Tensor> parts;
  for (const Span& span : spans.spans) {
    const int64_t n = span.end - span.begin;
    parts.push_back(attend(q.narrow(1, span.begin, n), k.narrow(1, span.begin, n),
                           v.narrow(1, span.begin, n), {}, true));
  }
  return parts.size() == 1 ? parts[0] : at::cat(parts, 0);
}

}  // namespace

Tensor causal_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                        const Tensor& sin, const AttentionSpans& spans,
                        const AttentionShape& shape) {
  if (on_fused_cpu(q)) return CausalAttention::apply(q, k, v, cos, sin, bounds_of(spans), shape);
  return composed_attention(rotate(split_heads(q, shape.num_heads), cos, sin),
                            rotate(split_heads(k, shape.num_kv_heads), cos, sin),
                            split_heads(v, shape.num_kv_heads), spans);
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
