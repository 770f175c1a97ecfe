#include "libfsdp/models/prefix_attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>

#include <cmath>

#include "libfsdp/models/heads.h"

namespace fsdp::models {
namespace {

using at::Tensor;

at::ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Rows of all query heads that share a KV head: [N, H d] -> wide [G, (H / G) N, d].
Tensor rows_of(const Tensor& x, const AttentionShape& shape) {
  return split_heads(x.to(wide_type(x)), shape.num_heads)
      .reshape({shape.num_kv_heads, -1, shape.head_dim});
}

Tensor rotated_rows(const Tensor& q, const Tensor& cos, const Tensor& sin,
                    const AttentionShape& shape) {
  return rotate(split_heads(q.to(wide_type(q)), shape.num_heads), cos, sin)
      .view({shape.num_kv_heads, -1, shape.head_dim});
}

// [H, N, d] from such rows.
Tensor heads_of(const Tensor& rows, const AttentionShape& shape) {
  return rows.view({shape.num_heads, -1, shape.head_dim});
}

// Keys or values [n, G d] -> [G, n, d].
Tensor kv_heads(const Tensor& x, const AttentionShape& shape) {
  return split_heads(x.to(wide_type(x)), shape.num_kv_heads);
}

Tensor scores_of(const Tensor& rows, const Tensor& keys) {
  return at::bmm(rows, keys.transpose(1, 2)) / std::sqrt(static_cast<double>(keys.size(2)));
}

}  // namespace

void join_prefix(const AttentionInputs& in, const Tensor& prefix, AttentionResult& own) {
  const AttentionShape& shape = in.shape;
  const Tensor scores =
      scores_of(rotated_rows(in.q, in.cos, in.sin, shape), kv_heads(prefix[0], shape));
  const Tensor own_sum = own.log_sum.view({shape.num_kv_heads, -1});
  const Tensor log_sum = at::logaddexp(own_sum, at::logsumexp(scores, at::IntArrayRef{-1}));
  const Tensor weights = (scores - log_sum.unsqueeze(-1)).exp_();
  const Tensor share = (own_sum - log_sum).exp_().unsqueeze(-1);
  const Tensor joined =
      rows_of(own.out, shape) * share + at::bmm(weights, kv_heads(prefix[1], shape));
  own.out = join_heads(heads_of(joined, shape)).to(own.out.scalar_type());
  own.log_sum = log_sum.view_as(own.log_sum);
}

Tensor prefix_backward(const AttentionInputs& in, const Tensor& prefix,
                       const AttentionResult& joined, const Tensor& grad_out,
                       AttentionGrads& grads) {
  const AttentionShape& shape = in.shape;
  const double scale = 1 / std::sqrt(static_cast<double>(shape.head_dim));
  const Tensor keys = kv_heads(prefix[0], shape), values = kv_heads(prefix[1], shape);
  const Tensor q = rotated_rows(in.q, in.cos, in.sin, shape);
  const Tensor dout = rows_of(grad_out, shape);
  const Tensor dot = (dout * rows_of(joined.out, shape)).sum(-1, /*keepdim=*/true);
  const Tensor log_sum = joined.log_sum.view({shape.num_kv_heads, -1, 1});
  const Tensor weights = (scores_of(q, keys) - log_sum).exp_();
  const Tensor dscores = (at::bmm(dout, values.transpose(1, 2)) - dot) * weights * scale;
  const Tensor dq = rotate(heads_of(at::bmm(dscores, keys), shape), in.cos, -in.sin);
  grads.q.add_(join_heads(dq));
  return at::stack({join_heads(at::bmm(dscores.transpose(1, 2), q)),
                    join_heads(at::bmm(weights.transpose(1, 2), dout))})
      .to(prefix.scalar_type());
}

Tensor prompt_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                        const Tensor& sin, const AttentionShape& shape) {
  const Tensor scores = scores_of(rotated_rows(q, cos, sin, shape), kv_heads(k, shape));
  const Tensor rows = at::bmm(at::softmax(scores, -1), kv_heads(v, shape));
  return join_heads(heads_of(rows, shape)).to(q.scalar_type());
}

}  // namespace fsdp::models
