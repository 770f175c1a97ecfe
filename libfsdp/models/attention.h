// Causal self-attention within documents, with rotary positions and grouped KV heads.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "libfsdp/models/batch.h"

namespace fsdp::models {

struct AttentionShape {
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
};

/// Softmax attention of each token to the tokens before it in its own span, and to a prefix if
/// there is one; q and k are rotated here, the prefix is not.
///
/// Shapes: q [N, H d], k and v [N, G d], cos and sin fp32 [N, d / 2], prefix [2, P, G d] (keys and
/// values; undefined = none) -> [N, H d].
/// Memory: for backward q, k, v, the result and fp32 [H, N]; no T x T matrix on the CPU.
at::Tensor causal_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& cos, const at::Tensor& sin,
                            const AttentionSpans& spans, const AttentionShape& shape,
                            const at::Tensor& prefix = {});

/// The same for `spans.cache` tokens that are there already plus N new ones, which are stored in
/// the cache of `layer` at `begin`. A prefix is the first of these tokens. No gradients.
at::Tensor cached_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& cos, const at::Tensor& sin, KvCache& cache,
                            int64_t layer, int64_t begin, const AttentionShape& shape);

}  // namespace fsdp::models
