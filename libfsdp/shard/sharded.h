// fully_shard: a torch::nn::Module whose parameters, gradients and optimizer state are divided over
// ranks.
//
//   auto sharded = fsdp::fully_shard(Net(...), comm, {.strategy = ...});
//   auto step = sharded.begin_step(micro_batches);
//   for (...) step.backward(loss_of(sharded(input)), tokens);
//   fsdp::StepStats stats = step.finish({.learning_rate = 1e-4, .max_grad_norm = 1.0});
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "libfsdp/shard/sharded_core.h"
#include "libfsdp/shard/tensors.h"

namespace fsdp {

using engine::StepOptions;
using engine::StepStats;

/// One optimizer step, from begin_step to finish.
class Step {
 public:
  explicit Step(std::shared_ptr<ShardedCore> core) : core_(std::move(core)) {}

  /// Backward of one micro-batch: all forwards since the last backward. `loss_sum` is the sum (not
  /// the mean) of the losses of `weight` terms (tokens); the update uses the gradient of the sum
  /// over all ranks and micro-batches divided by the sum of the weights. Collective through the
  /// units it passes. Throws ConfigError when begin_step announced fewer micro-batches.
  void backward(const at::Tensor& loss_sum, int64_t weight) { core_->backward(loss_sum, weight); }

  /// Collective. Reduces, agrees on loss and norm, clips, updates. Equal result on all ranks.
  /// Throws NumericsError on all ranks, without any update, when a loss or gradient is not finite.
  StepStats finish(const StepOptions& options) { return core_->finish_step(options); }

  /// Collective. Likewise, but `update()` changes the parameters: in local_shards() it finds the
  /// gradients of the mean loss, clipped. It is not called when the step is skipped.
  StepStats finish_with(const StepOptions& options, const std::function<void()>& update) {
    return core_->finish_step(options, update);
  }

  /// Collective, after the last backward. All gradients are summed over ranks and micro-batches and
  /// can be looked at (full_gradient); finish() goes on from here.
  void complete_gradients() { core_->executor().complete_gradients(); }

 private:
  std::shared_ptr<ShardedCore> core_;
};

/// A sharded module: called in the model's place. A cheap handle; used by one thread.
template <class Holder>
class Sharded {
 public:
  using Model = typename Holder::ContainedType;

  Sharded(Holder model, std::shared_ptr<ShardedCore> core)
      : model_(std::move(model)), core_(std::move(core)) {}

  /// model->forward(arguments...), with the root's parameters readable.
  template <class... Arguments>
  auto operator()(Arguments&&... arguments) {
    return run([&](Model& model) { return model.forward(std::forward<Arguments>(arguments)...); });
  }

  /// call(model), likewise: for models with more entry points than forward.
  template <class Call>
  auto run(Call&& call) {
    const RootScope scope(*core_);
    return call(*model_);
  }

  /// Collective. `micro_batches` of this rank; 0 is legal, and ranks may differ.
  Step begin_step(int64_t micro_batches) {
    core_->begin_step(micro_batches);
    return Step(core_);
  }

  /// Joins the other ranks' forward without gradients (evaluation), without a call of the model.
  /// Needed only where parameters are gathered into slots: elsewhere ranks evaluate on their own.
  void ghost_forward() { core_->executor().ghost_forward(); }

  /// Fills this rank's part of every parameter: fill(name, shape, begin, values) writes the
  /// elements [begin, begin + values.size()) of the flattened parameter. Collective; must not
  /// depend on the rank.
  template <class Fill>
  void initialize(Fill&& fill) {
    initialize_parameters(*core_, std::forward<Fill>(fill));
  }

  /// See shard/tensors.h.
  std::vector<LocalShard> local_shards() { return fsdp::local_shards(*core_); }
  at::Tensor full_parameter(const std::string& name) { return fsdp::full_parameter(*core_, name); }
  at::Tensor full_gradient(const std::string& name) { return fsdp::full_gradient(*core_, name); }

  Holder& module() { return model_; }
  ShardedCore& core() { return *core_; }
  comm::Communicator& comm() { return core_->comm(); }

 private:
  class RootScope {
   public:
    explicit RootScope(ShardedCore& core) : core_(core) { core_.enter_root(); }
    ~RootScope() { core_.leave_root(); }
    RootScope(const RootScope&) = delete;
    RootScope& operator=(const RootScope&) = delete;

   private:
    ShardedCore& core_;
  };

  Holder model_;
  std::shared_ptr<ShardedCore> core_;
};

/// Divides `model` over the ranks of `comm`. Collective.
///
/// Each fsdp::Unit in the module tree is gathered around its call; what lies outside of units forms
/// the root, gathered around the model's call and its backward. The module's parameters keep their
/// names and identity, but hold data only while they are gathered. Memory per rank: see
/// plan::plan_memory. Throws ConfigError (see ShardedCore).
template <class Holder>
Sharded<Holder> fully_shard(Holder model, std::shared_ptr<comm::Communicator> comm,
                            const ShardOptions& options = {}) {
  auto core = std::make_shared<ShardedCore>(model.ptr(), std::move(comm), options);
  return Sharded<Holder>(std::move(model), std::move(core));
}

}  // namespace fsdp
