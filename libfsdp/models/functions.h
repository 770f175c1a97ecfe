// Differentiable operations of a transformer block that are one pass over memory on the CPU and
// keep little for backward. On other devices and dtypes: the same formulas in ATen operations.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace fsdp::models {

/// x / sqrt(mean(x^2) + eps) * weight over the last dim (width of `weight`). Keeps x and one fp32
/// number a row.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

/// fsdp::linear(rms_norm(x, norm_weight, eps), weight, bias) for each of the layers; biases: one
/// for each, or none at all. x [N, in]. Keeps x alone, and makes the normed rows again in backward;
/// so it does for weights with a plain adapter (lora::plain_linear), and r columns of each.
std::vector<at::Tensor> norm_linears(const at::Tensor& x, const at::Tensor& norm_weight, double eps,
                                     const std::vector<at::Tensor>& weights,
                                     const std::vector<at::Tensor>& biases = {});

/// silu(gate) * up. Keeps both.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

/// fsdp::linear(swiglu(gate, up), weight, bias). Keeps gate and up, and makes the product of the
/// two again in backward: a third less to keep for one cheap pass. Likewise with a plain adapter.
at::Tensor swiglu_linear(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& weight,
                         const at::Tensor& bias);

}  // namespace fsdp::models
