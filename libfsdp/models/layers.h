// Small modules that LibTorch lacks or cannot build on the meta device. Two-dimensional inputs: [N,
// features].
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "libfsdp/lora/target.h"

#include <vector>

namespace fsdp::models {

/// y = x W^T + b. Unlike torch::nn::Linear it takes TensorOptions and does not initialise.
class LinearImpl : public torch::nn::Module, public lora::Target {
 public:
  LinearImpl(int64_t in_features, int64_t out_features, bool with_bias,
             const at::TensorOptions& options);
  at::Tensor forward(const at::Tensor& input);
  lora::TargetKind target_kind() const override { return lora::TargetKind::kLinear; }
  const at::Tensor& target_weight() const override { return weight; }

  at::Tensor weight;  ///< [out, in]
  at::Tensor bias;    ///< [out], undefined without one.
};
TORCH_MODULE(Linear);

/// Rows of a table.
class EmbeddingImpl : public torch::nn::Module, public lora::Target {
 public:
  /// `tied`: another operation also gives the weight a dense gradient in the same backward, so this
  /// one may be sparse.
  EmbeddingImpl(int64_t rows, int64_t features, bool tied, const at::TensorOptions& options);
  at::Tensor forward(const at::Tensor& ids);
  lora::TargetKind target_kind() const override { return lora::TargetKind::kEmbedding; }
  const at::Tensor& target_weight() const override { return weight; }

  at::Tensor weight;  ///< [rows, features]

 private:
  bool tied_;
};
TORCH_MODULE(Embedding);

/// y = x / sqrt(mean(x^2) + eps) * weight, over the last `features` numbers; statistics in fp32.
class RmsNormImpl : public torch::nn::Module {
 public:
  RmsNormImpl(int64_t features, double eps, const at::TensorOptions& options);
  at::Tensor forward(const at::Tensor& input);

  double eps() const { return eps_; }

  at::Tensor weight;  ///< [features]

 private:
  double eps_;
};
TORCH_MODULE(RmsNorm);

/// linear(norm(x)) for each of the layers, x [N, features]. Only x is kept for backward, see
/// models::norm_linears. All layers have a bias, or none.
std::vector<at::Tensor> norm_linears(const at::Tensor& x, const RmsNorm& norm,
                                     const std::vector<Linear>& layers);

}  // namespace fsdp::models
