// What low-rank adapters compute.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "libfsdp/lora/packed_weight.h"

namespace fsdp::lora {

/// A and B of one adapter of one weight.
struct LowRank {
  at::Tensor a;  ///< [r, in] of a Linear, [r, rows] of an Embedding.
  at::Tensor b;  ///< [out, r]; of an Embedding [features, r].
  double scaling = 1;
};

/// A frozen matrix [out, in] as it is kept: itself, or packed bytes.
struct FrozenWeight {
  at::Tensor tensor;
  std::shared_ptr<const PackedWeight> packed;  ///< Null = the tensor is the matrix.

  at::Tensor matrix(at::ScalarType type) const {
    return packed ? unpack(*packed, tensor, type) : tensor;
  }
};

/// x W^T + bias. Keeps the weight as it lies, and nothing of x. Shapes: x [..., in] -> [..., out].
at::Tensor frozen_linear(const at::Tensor& x, const FrozenWeight& weight, const at::Tensor& bias);

/// x W^T + bias + scaling (u A^T) B^T, where u is x, or x after dropout (undefined = x).
///
/// For backward u and the r columns of u A^T are kept, not x. Gradients of A and B go straight to
/// where they are reduced from. Shapes: x, u [..., in] -> [..., out].
at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& u, const FrozenWeight& weight,
                       const at::Tensor& bias, const LowRank& adapter);

/// W + scaling B A, in fp32: what merging makes of a weight. Shapes: as the weight [out, in].
at::Tensor merged_linear(const at::Tensor& weight, const LowRank& adapter);
/// Norm of each row of that, [out]: the magnitude with which DoRA begins, and what it divides by.
at::Tensor row_norms(const at::Tensor& weight, const LowRank& adapter);

/// DoRA: scale (x W^T + s (x A^T) B^T) + bias, scale = m / |W + s B A| by row, the norm taken for a
/// constant. With dropout, as PEFT: x W^T + bias + (scale - 1) u W^T + scale s (u A^T) B^T.
at::Tensor dora_linear(const at::Tensor& x, const at::Tensor& u, const FrozenWeight& weight,
                       const at::Tensor& bias, const LowRank& adapter, const at::Tensor& magnitude);

}  // namespace fsdp::lora
