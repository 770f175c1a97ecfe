// Attention's tensors by heads, in ATen operations.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fsdp::models {

/// [N, heads d] -> [heads, N, d], a view.
at::Tensor split_heads(const at::Tensor& x, int64_t heads);
/// [heads, N, d] -> [N, heads d].
at::Tensor join_heads(const at::Tensor& x);
/// x [heads, N, d], cos and sin [N, d / 2]; contiguous.
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace fsdp::models
