// What low-rank adapters compute.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "libfsdp/lora/linear_group.h"
#include "libfsdp/lora/target.h"

namespace torch::autograd {
struct AutogradContext;
}

namespace fsdp::lora {

/// Saves these tensors, and behind them the group's parameters, so that a change of one before
/// backward is an error; and the group.
void save_with_group(torch::autograd::AutogradContext& context, std::vector<at::Tensor> saved,
                     const std::shared_ptr<const LinearGroup>& group);
/// After get_saved_variables(), which checks them.
std::shared_ptr<const LinearGroup> saved_group(torch::autograd::AutogradContext& context);

/// x W^T + bias. Keeps the weight as it lies, and nothing of x. Shapes: x [..., in] -> [..., out].
at::Tensor frozen_linear(const at::Tensor& x, const FrozenWeight& weight, const at::Tensor& bias);

/// x W^T + bias + scaling (u A^T) B^T, where u is x, or x after dropout (undefined = x).
///
/// For backward u and the r columns of u A^T are kept, not x. Gradients of A and B go straight to
/// where they are reduced from. Shapes: x, u [..., in] -> [..., out].
at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& u, const FrozenWeight& weight,
                       const at::Tensor& bias, const LowRank& adapter);

/// What the adapter makes of its weight, of that shape: W + scaling B A; of an embedding
/// W + scaling (B A)^T; of a convolution likewise over [out, rest]. Differentiable in A and B.
at::Tensor adapted_weight(TargetKind kind, const at::Tensor& weight, const LowRank& adapter);
/// Norms of that in fp32, one for each output (feature of an embedding), [out]: the magnitude with
/// which DoRA begins, and what it divides by.
at::Tensor output_norms(TargetKind kind, const at::Tensor& weight, const LowRank& adapter);
/// Magnitude by norm, the norm taken for a constant, [out] in the weight's type. Shapes: magnitude
/// of `out` elements.
at::Tensor dora_scale(TargetKind kind, const at::Tensor& weight, const LowRank& adapter,
                      const at::Tensor& magnitude);

/// DoRA: scale (x W^T + s (x A^T) B^T) + bias. With dropout, as PEFT: x W^T + bias + (scale - 1)
/// u W^T + scale s (u A^T) B^T.
at::Tensor dora_linear(const at::Tensor& x, const at::Tensor& u, const FrozenWeight& weight,
                       const at::Tensor& bias, const LowRank& adapter, const at::Tensor& magnitude);

/// scaling B(A(u)): A as the layer's convolution, but over all channels, B with a kernel of one.
/// Shapes: as the layer's result.
at::Tensor convolved_low_rank(const at::Tensor& u, const LowRank& adapter, int64_t groups,
                              const Convolution& convolution);
/// As dora_linear.
at::Tensor dora_convolution(const at::Tensor& x, const at::Tensor& u, const at::Tensor& weight,
                            const at::Tensor& bias, const LowRank& adapter,
                            const at::Tensor& magnitude, const Convolution& convolution);

}  // namespace fsdp::lora
