#include "libfsdp/shard/weight_adapter.h"

#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <utility>

#include "libfsdp/base/error.h"

namespace fsdp {
namespace {

// A frozen parameter gets no gradient, so that its hook never runs: it is a place that moves with
// the parameter, whatever data that holds.
class AdapterHook : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit AdapterHook(std::shared_ptr<WeightAdapter> weight_adapter)
      : adapter(std::move(weight_adapter)) {}
  void operator()(const torch::autograd::Variable&) override {}

  std::shared_ptr<WeightAdapter> adapter;
};

}  // namespace

void set_weight_adapter(const at::Tensor& weight, std::shared_ptr<WeightAdapter> adapter) {
  if (weight.requires_grad())
    throw ConfigError("a weight that is trained itself cannot have an adapter: freeze it");
  torch::autograd::impl::set_post_acc_grad_hooks(
      weight, adapter ? std::make_unique<AdapterHook>(std::move(adapter)) : nullptr);
}

WeightAdapter* weight_adapter(const at::Tensor& weight) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(weight);
  if (!meta || !meta->post_acc_grad_hooks_) return nullptr;
  const auto* hook = dynamic_cast<const AdapterHook*>(meta->post_acc_grad_hooks_.get());
  return hook ? hook->adapter.get() : nullptr;
}

}  // namespace fsdp
