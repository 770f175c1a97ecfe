// Differentiable operations of a transformer block that are one pass over memory on the CPU and
// keep little for backward. On other devices and dtypes: the same formulas in ATen operations.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fsdp::models {

/// x / sqrt(mean(x^2) + eps) * weight over the last dim (width of `weight`). Keeps x and one fp32
/// number a row.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

/// silu(gate) * up. Keeps both.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

}  // namespace fsdp::models
