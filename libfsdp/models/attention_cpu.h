// The CPU path of attention: blocks of 64 queries by 64 keys that stay in the cache. See
// attention.h for the shapes.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "libfsdp/models/attention.h"

namespace fsdp::models {

struct AttentionInputs {
  at::Tensor q, k, v;           // float or bfloat16, contiguous
  at::Tensor cos, sin;          // fp32, contiguous
  std::vector<int64_t> bounds;  ///< Where the spans begin, and the end of the last one.
  AttentionShape shape;
};

struct AttentionResult {
  at::Tensor out;
  at::Tensor log_sum;  ///< fp32 [H, N]: log of the softmax's denominators.
};

AttentionResult attention_cpu_forward(const AttentionInputs& inputs);

struct AttentionGrads {
  at::Tensor q, k, v;
};

AttentionGrads attention_cpu_backward(const AttentionInputs& inputs, const AttentionResult& result,
                                      const at::Tensor& grad_out);

/// Rotates and stores the new keys and values, then attends from each new token to all up to
/// itself.
at::Tensor attention_cpu_cached(const AttentionInputs& inputs, const at::Tensor& key_cache,
                                const at::Tensor& value_cache, int64_t begin);

}  // namespace fsdp::models
