// Attention to tokens outside of the sequences, which all positions see: a prefix (prefix tuning)
// and adaption prompts (llama-adapter).
#pragma once

#include <ATen/core/Tensor.h>

#include "libfsdp/models/attention_cpu.h"

namespace fsdp::models {

/// Makes of `own`, the attention of each token to its span, that to a prefix and the span: one
/// softmax over both. prefix [2, P, G d]: keys, which are not rotated, and values.
void join_prefix(const AttentionInputs& inputs, const at::Tensor& prefix, AttentionResult& own);

/// The gradient of the prefix; adds to grads.q what comes through it. `joined` is join_prefix's
/// result: with it attention_cpu_backward() gives the part of the spans.
at::Tensor prefix_backward(const AttentionInputs& inputs, const at::Tensor& prefix,
                           const AttentionResult& joined, const at::Tensor& grad_out,
                           AttentionGrads& grads);

/// softmax(q k^T / sqrt(d)) v over n tokens alone; q is rotated here. Differentiable.
/// Shapes: q [N, H d], k and v [n, G d] -> [N, H d].
at::Tensor prompt_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& cos, const at::Tensor& sin,
                            const AttentionShape& shape);

}  // namespace fsdp::models
