// Gradients that a hand-written backward writes where they are sent from, without a tensor in
// between.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function_hook.h>

#include <optional>

namespace fsdp {

/// A place for a parameter's gradient of this micro-batch.
struct GradientPlace {
  at::Tensor tensor;        ///< Of the parameter's shape; its dtype is the reduce_dtype.
  bool accumulate = false;  ///< Add to what lies there; else replace it.
};

/// The hook of a sharded parameter, as a backward sees it.
class GradientSink : public torch::autograd::PostAccumulateGradHook {
 public:
  /// Where a gradient of this type goes, counted as arrived from here on: it must be written, and
  /// the backward returns none for the parameter. Nothing when its slot is still in use or has
  /// another type: return the gradient instead.
  virtual std::optional<GradientPlace> take_place(at::ScalarType type) = 0;
};

/// The place for `parameter`'s gradient if it is sharded and can be written now, see take_place. In
/// a torch::autograd::Function's backward, for a parameter from get_saved_variables(), or kept
/// otherwise: the module's own tensor.
std::optional<GradientPlace> gradient_place(const at::Tensor& parameter, at::ScalarType type);

/// d^T @ x as the gradient of a weight [out, in], d [N, out] and x [N, in]: written to its place,
/// then the result is undefined; or returned.
at::Tensor linear_weight_gradient(const at::Tensor& weight, const at::Tensor& d,
                                  const at::Tensor& x);
/// Likewise the sum of the rows of d, of a bias.
at::Tensor linear_bias_gradient(const at::Tensor& bias, const at::Tensor& d);

}  // namespace fsdp
