// Dropout whose numbers do not depend on ranks, strategy or recomputation.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/options/dropout.h>
#include <torch/nn/pimpl.h>

#include <ostream>

namespace fsdp {

/// Inverted dropout: each element of x is zero with probability p, else x / (1 - p).
///
/// The mask is a function of the place in training and the element's index (see Note [Random
/// sites]); outside of a sharded model's step, of a key from torch's default generator. Backward
/// makes it again: nothing is saved. With training = false or p = 0 the result is x itself.
/// Shapes: result as x, contiguous. Cost: about 1 ns an element and thread (fp16: 4) on CPU;
/// fp64 and other devices multiply by a mask made on the CPU. Throws ConfigError for p
/// outside [0, 1].
at::Tensor dropout(const at::Tensor& x, double p, bool training = true);

/// The module, in the place of torch::nn::Dropout. Throws ConfigError for inplace(true).
class DropoutImpl : public torch::nn::Cloneable<DropoutImpl> {
 public:
  explicit DropoutImpl(double p) : DropoutImpl(torch::nn::DropoutOptions(p)) {}
  explicit DropoutImpl(const torch::nn::DropoutOptions& options_ = {});
  void reset() override;
  at::Tensor forward(const at::Tensor& x) { return fsdp::dropout(x, options.p(), is_training()); }
  void pretty_print(std::ostream& stream) const override;

  torch::nn::DropoutOptions options;
};
TORCH_MODULE(Dropout);

/// Throws ConfigError that names the modules of LibTorch in `model` that draw from a global
/// generator in training, so that their numbers would depend on the number of ranks: dropouts,
/// recurrent layers and attention with dropout > 0, RReLU, fractional pooling. Those whose
/// probability is zero draw nothing.
void refuse_stock_dropout(const torch::nn::Module& model);

}  // namespace fsdp
