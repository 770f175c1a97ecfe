// What stands between an operation and a frozen weight: it computes in the operation's place.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>

namespace fsdp {

/// A convolution with the stride, padding and dilation of one call, of input, weight, bias
/// (undefined = none) and groups.
using Convolution = std::function<at::Tensor(const at::Tensor& input, const at::Tensor& weight,
                                             const at::Tensor& bias, int64_t groups)>;

class WeightAdapter {
 public:
  virtual ~WeightAdapter() = default;
  /// In the place of fsdp::linear(input, weight, bias).
  virtual at::Tensor linear(const at::Tensor& input, const at::Tensor& weight,
                            const at::Tensor& bias) = 0;
  /// In the place of fsdp::embedding(weight, ids); with the two options of at::embedding, which
  /// change only the gradient.
  virtual at::Tensor embedding(const at::Tensor& weight, const at::Tensor& ids,
                               int64_t padding_idx = -1, bool scale_grad_by_freq = false) = 0;
  /// In the place of convolution(input, weight, bias, groups).
  virtual at::Tensor convolve(const at::Tensor& input, const at::Tensor& weight,
                              const at::Tensor& bias, int64_t groups,
                              const Convolution& convolution) = 0;
  /// What any other operation, of that name, sees of `weight`: the matrix that it stands for.
  /// Throws ConfigError where there is none.
  virtual at::Tensor matrix(const at::Tensor& weight, const std::string& operation) = 0;
};

/// Whose operations on a weight ask for its adapter: fsdp::linear and fsdp::embedding, or all of
/// LibTorch's too, as its own layers call them (see adapted_operations.h).
enum class Operations { kOurs, kAll };

/// Gives `weight` an adapter, or takes it away (null). Throws ConfigError for a weight that
/// requires grad.
void set_weight_adapter(const at::Tensor& weight, std::shared_ptr<WeightAdapter> adapter,
                        Operations operations = Operations::kOurs);
/// That of `weight`; null = none. Cost: some nanoseconds.
WeightAdapter* weight_adapter(const at::Tensor& weight);
/// Prepares `data`, which `weight` will be given by set_data().
void prepare_data(const at::Tensor& weight, const at::Tensor& data);

}  // namespace fsdp
