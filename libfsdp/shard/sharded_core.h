// The part of a sharded module that does not depend on its type: units, parameters, and the
// executor that moves them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "libfsdp/engine/executor.h"
#include "libfsdp/optim/loss_scaler.h"
#include "libfsdp/shard/module_units.h"
#include "libfsdp/shard/options.h"
#include "libfsdp/shard/random.h"

namespace fsdp {

/// A contiguous piece of one parameter that this rank owns.
struct OwnedSlice {
  std::string name;
  int64_t param_at = 0;  ///< First element, in the flattened parameter.
  int64_t numel = 0;
  int bucket = 0;
  int64_t shard_at = 0;  ///< First element, in this rank's shard of the bucket.
};

class ShardedCore {
 public:
  /// Collective. Takes over all parameters of `model`: outside of a unit's call each is a shell
  /// that throws.
  ///
  /// Parameters on meta are left to initialize() or load_weights(); parameters with values are
  /// taken from rank 0. Throws ConfigError for a buffer on meta, what find_units() refuses, options
  /// that cannot work, stock random layers in deterministic mode; DoesNotFitError for a memory
  /// budget below what the plan needs.
  ShardedCore(std::shared_ptr<torch::nn::Module> model, std::shared_ptr<comm::Communicator> comm,
              const ShardOptions& options);
  ~ShardedCore();
  ShardedCore(const ShardedCore&) = delete;
  ShardedCore& operator=(const ShardedCore&) = delete;

  engine::Executor& executor() { return *executor_; }
  const engine::Executor& executor() const { return *executor_; }
  comm::Communicator& comm() { return executor_->comm(); }
  const ShardOptions& options() const { return options_; }
  const std::vector<ParameterInfo>& parameters() const { return infos_; }
  const torch::nn::Module& module() const { return *model_; }

  /// Pieces of parameters on this rank, in layout order. Under replication several ranks own the
  /// same piece.
  std::vector<OwnedSlice> owned_slices() const;
  /// Whether this rank is the one that writes what it owns (the first replica).
  bool writes_state() const;
  /// fp32 values of a piece; `at` counts from the piece's begin. Exact for every precision that has
  /// a master. What was stored is there for all ranks after publish().
  void store(const OwnedSlice& piece, int64_t at, std::span<const float> values);
  void load(const OwnedSlice& piece, int64_t at, std::span<float> values) const;
  /// Collective. After store(), before the next forward.
  void publish() { executor_->publish(); }

  /// Around a call of the whole model: the root's parameters are readable.
  void enter_root();
  void leave_root() noexcept;

  void begin_step(int64_t micro_batches);
  void backward(const at::Tensor& loss_sum, int64_t trainable_tokens);
  engine::StepStats finish_step(engine::StepOptions options,
                                const std::function<void()>& update = {});
  /// Null without one.
  optim::LossScaler* loss_scaler() { return scaler_ ? &*scaler_ : nullptr; }

 private:
  struct Parameter {
    at::Tensor tensor;  // The module's own: only its data is exchanged.
    at::Tensor shell;
    at::Tensor view;   // Of where it lies when it is gathered.
    at::Tensor place;  // Of its gradient; undefined when frozen.
    at::Tensor early;  // Its gradient, while the slot for it is still in use.
    int bucket = 0;
    int segment = 0;
    uint32_t version = 0;
  };
  struct UnitState;  // Also the unit's runtime.
  class Sink;

  void take_over(std::vector<ModuleUnit>& units);
  void fill_from_first_rank(const UnitState& unit, const std::vector<at::Tensor>& values);
  Parameter make_parameter(const ModuleUnit& unit, const ModuleParameter& found, int bucket,
                           int segment);
  void expose(UnitState& unit);
  void conceal(UnitState& unit) noexcept;
  void conceal_what_backward_left(bool all = false);
  void collect_gradient(UnitState& unit, Parameter& parameter);
  void collect_early_gradients(int unit);
  std::optional<bool> take_place(int unit, Parameter& parameter);
  void throw_deferred();

  std::shared_ptr<torch::nn::Module> model_;
  ShardOptions options_;
  std::vector<std::unique_ptr<UnitState>> units_;  // 0 is the root.
  std::vector<ParameterInfo> infos_;
  std::unique_ptr<engine::Executor> executor_;
  std::vector<UnitState*> in_backward_;  // Units whose parameters are readable for backward.
  bool recomputing_ = false;  // A unit's forward is run again, or for the first time to be so.
  int64_t model_calls_ = 0;   // In this micro-batch.
  std::optional<RandomScope::Root> random_;
  std::optional<optim::LossScaler> scaler_;
  std::string deferred_error_;  // Found where nothing may throw.
};

/// See Sharded::initialize.
using FillFunction = std::function<void(const std::string& name, c10::IntArrayRef shape,
                                        int64_t begin, std::span<float> values)>;
/// Collective.
void initialize_parameters(ShardedCore& core, const FillFunction& fill);

}  // namespace fsdp
