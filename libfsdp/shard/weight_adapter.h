// What stands between an operation and a frozen weight: fsdp::linear and fsdp::embedding let it
// compute in their place.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

namespace fsdp {

class WeightAdapter {
 public:
  virtual ~WeightAdapter() = default;
  /// In the place of fsdp::linear(input, weight, bias).
  virtual at::Tensor linear(const at::Tensor& input, const at::Tensor& weight,
                            const at::Tensor& bias) = 0;
  /// In the place of fsdp::embedding(weight, ids).
  virtual at::Tensor embedding(const at::Tensor& weight, const at::Tensor& ids) = 0;
};

/// Gives `weight` an adapter, or takes it away (null). Throws ConfigError for a weight that
/// requires grad.
void set_weight_adapter(const at::Tensor& weight, std::shared_ptr<WeightAdapter> adapter);
/// That of `weight`; null = none. Cost: some nanoseconds.
WeightAdapter* weight_adapter(const at::Tensor& weight);

}  // namespace fsdp
