#include "libfsdp/shard/unit_call.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <mutex>

namespace fsdp::detail {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Identity on several results at once: its backward runs when the gradients of all of them are
// known, hence before any node inside the unit and after every node of units called later.
struct Gate : torch::autograd::Function<Gate> {
  static variable_list forward(AutogradContext* context, at::TensorList results, int64_t runtime) {
    context->saved_data["runtime"] = runtime;
    variable_list outputs;
    for (const at::Tensor& result : results) outputs.push_back(result.view_as(result));
    return outputs;
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    reinterpret_cast<UnitRuntime*>(context->saved_data["runtime"].toInt())->enter_backward();
    gradients.emplace_back();  // For `runtime`.
    return gradients;
  }
};

// The state of the default generator, so that a recomputation draws the numbers of the first run.
class RandomState {
 public:
  RandomState() : state_(get()) {}
  void restore() const {
    at::Generator generator = at::globalContext().defaultGenerator(at::kCPU);
    const std::lock_guard lock(generator.mutex());
    generator.set_state(state_);
  }

 private:
  static at::Tensor get() {
    at::Generator generator = at::globalContext().defaultGenerator(at::kCPU);
    const std::lock_guard lock(generator.mutex());
    return generator.get_state();
  }
  at::Tensor state_;
};

struct CheckpointCall : torch::CustomClassHolder {
  UnitRuntime* runtime = nullptr;
  Recompute recompute;
  std::optional<RandomState> random;
  RandomScope::Site site;
};

struct Checkpoint : torch::autograd::Function<Checkpoint> {
  // `token` requires grad, so that the results do too even when no input does (frozen embedding,
  // adapters inside).
  static variable_list forward(AutogradContext* context, at::TensorList inputs,
                               const at::Tensor& /*token*/, CheckpointCall* call) {
    context->save_for_backward(inputs.vec());
    context->saved_data["call"] =
        c10::IValue::make_capsule(c10::intrusive_ptr<CheckpointCall>::reclaim_copy(call));
    const at::NoGradGuard no_graph;
    const RecomputeScope units_inside(*call->runtime);
    return call->recompute(inputs.vec());
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto capsule = context->saved_data["call"].toCapsule();
    auto& call = static_cast<CheckpointCall&>(*capsule);
    call.runtime->enter_backward();
    variable_list inputs = context->get_saved_variables();
    for (at::Tensor& input : inputs) input = input.detach().requires_grad_(input.requires_grad());
    variable_list roots;
    variable_list seeds;
    {
      const at::AutoGradMode graph(true);
      const RandomState now;
      call.random->restore();
      const RandomScope::UnitCall again(call.site);
      const RecomputeScope units_inside(*call.runtime);
      const std::vector<at::Tensor> results = call.recompute({inputs.begin(), inputs.end()});
      now.restore();
      for (size_t i = 0; i < results.size(); ++i) {
        if (!results[i].requires_grad() || !gradients[i].defined()) continue;
        roots.push_back(results[i]);
        seeds.push_back(gradients[i]);
      }
    }
    if (!roots.empty()) torch::autograd::backward(roots, seeds);
    variable_list input_gradients;
    for (const at::Tensor& input : inputs) input_gradients.push_back(input.grad());
    input_gradients.resize(inputs.size() + 2);  // For `token` and `call`.
    return input_gradients;
  }
};

}  // namespace

void detach_from_parameters(const UnitRuntime& runtime, const std::vector<at::Tensor*>& results) {
  for (at::Tensor* result : results) {
    if (result->defined() && runtime.is_parameter_memory(*result)) *result = result->clone();
  }
}

void gate(UnitRuntime& runtime, const std::vector<at::Tensor*>& results) {
  std::vector<at::Tensor*> differentiable;
  for (at::Tensor* result : results) {
    if (result->defined() && result->requires_grad()) differentiable.push_back(result);
  }
  if (differentiable.empty()) return;
  if (differentiable.size() == 1 && !differentiable[0]->is_leaf()) {
    // A hook does the same for one result, and leaves in-place operations on it legal.
    differentiable[0]->register_hook([&runtime](const at::Tensor&) { runtime.enter_backward(); });
    return;
  }
  const variable_list gated =
      Gate::apply(at::TensorList(values_of(differentiable)), reinterpret_cast<int64_t>(&runtime));
  assign(differentiable, {gated.begin(), gated.end()});
}

std::vector<at::Tensor> checkpoint(UnitRuntime& runtime, const std::vector<at::Tensor>& inputs,
                                   Recompute recompute) {
  const auto call = c10::make_intrusive<CheckpointCall>();
  call->runtime = &runtime;
  call->recompute = std::move(recompute);
  call->random.emplace();
  const at::Tensor token = at::zeros({}).requires_grad_();
  const ForwardScope scope(runtime);
  const RandomScope::UnitCall random;
  call->site = random.site();
  const variable_list results = Checkpoint::apply(at::TensorList(inputs), token, call.get());
  return {results.begin(), results.end()};
}

}  // namespace fsdp::detail
