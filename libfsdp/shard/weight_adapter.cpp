#include "libfsdp/shard/weight_adapter.h"

#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/adapted_operations.h"

namespace fsdp {
namespace {

// A frozen parameter gets no gradient, so that its hook never runs: it is a place that moves with
// the parameter, whatever data that holds.
class AdapterHook : public torch::autograd::PostAccumulateGradHook {
 public:
  AdapterHook(std::shared_ptr<WeightAdapter> weight_adapter, Operations which)
      : adapter(std::move(weight_adapter)), operations(which) {}
  void operator()(const torch::autograd::Variable&) override {}

  std::shared_ptr<WeightAdapter> adapter;
  Operations operations;
};

const AdapterHook* hook_of(const at::Tensor& weight) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(weight);
  if (!meta || !meta->post_acc_grad_hooks_) return nullptr;
  return dynamic_cast<const AdapterHook*>(meta->post_acc_grad_hooks_.get());
}

}  // namespace

void set_weight_adapter(const at::Tensor& weight, std::shared_ptr<WeightAdapter> adapter,
                        Operations operations) {
  if (weight.requires_grad())
    throw ConfigError("a weight that is trained itself cannot have an adapter: freeze it");
  torch::autograd::impl::set_post_acc_grad_hooks(
      weight, adapter ? std::make_unique<AdapterHook>(std::move(adapter), operations) : nullptr);
  prepare_data(weight, weight);
}

WeightAdapter* weight_adapter(const at::Tensor& weight) {
  const AdapterHook* hook = hook_of(weight);
  return hook ? hook->adapter.get() : nullptr;
}

void prepare_data(const at::Tensor& weight, const at::Tensor& data) {
  const AdapterHook* hook = hook_of(weight);
  if (hook && hook->operations == Operations::kAll) adapt_operations(data);
}

}  // namespace fsdp
