// The part of a sharded module that does not depend on its type: units, parameters, and the
// executor that moves them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "libfsdp/engine/executor.h"
#include "libfsdp/shard/options.h"
#include "libfsdp/shard/unit.h"

namespace fsdp {

/// A parameter of the sharded module, by its name in named_parameters().
struct ParameterInfo {
  std::string name;
  std::vector<int64_t> shape;
  bool trainable = true;
  std::string unit;                  ///< "" = the root.
  std::vector<std::string> aliases;  ///< Other names of the same tensor (tied parameters).
};

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
  /// taken from rank 0. Throws ConfigError for a buffer on meta, nested units, or a parameter that
  /// is not a floating type.
  ShardedCore(std::shared_ptr<torch::nn::Module> model, std::shared_ptr<comm::Communicator> comm,
              const ShardOptions& options);
  ~ShardedCore();
  ShardedCore(const ShardedCore&) = delete;
  ShardedCore& operator=(const ShardedCore&) = delete;

  engine::Executor& executor() { return *executor_; }
  comm::Communicator& comm() { return executor_->comm(); }
  const ShardOptions& options() const { return options_; }
  const std::vector<ParameterInfo>& parameters() const { return infos_; }

  /// Pieces of parameters on this rank, in layout order. Under replication several ranks own the
  /// same piece.
  std::vector<OwnedSlice> owned_slices() const;
  /// Whether this rank is the one that writes what it owns (the first replica).
  bool writes_state() const;
  /// fp32 values of a piece; `at` counts from the piece's begin. Exact for every precision.
  void store(const OwnedSlice& piece, int64_t at, std::span<const float> values);
  void load(const OwnedSlice& piece, int64_t at, std::span<float> values) const;

  /// Around a call of the whole model: the root's parameters are readable.
  void enter_root();
  void leave_root() noexcept;

  void begin_step(int64_t micro_batches);
  void backward(const at::Tensor& loss_sum, int64_t trainable_tokens);
  engine::StepStats finish_step(const engine::StepOptions& options);

 private:
  struct Parameter {
    at::Tensor tensor;  // The module's own: only its data is exchanged.
    at::Tensor shell;
    at::Tensor view;  // Of its place in the unit's slot; made when the slot is known.
    int bucket = 0;
    int segment = 0;
    uint32_t version = 0;
  };
  struct UnitState;  // Also the unit's runtime.
  class GradientHook;

  void find_units();
  void find_parameters();
  void take_over();
  void refuse_meta_buffers() const;
  void share_values(const std::vector<at::Tensor>& values);
  void install_hooks();
  void expose(UnitState& unit);
  void conceal(UnitState& unit) noexcept;
  void collect_gradient(size_t unit, size_t parameter);
  void throw_deferred();

  std::shared_ptr<torch::nn::Module> model_;
  ShardOptions options_;
  std::vector<std::unique_ptr<UnitState>> units_;  // 0 is the root.
  std::vector<ParameterInfo> infos_;
  std::unique_ptr<engine::Executor> executor_;
  int exposed_in_backward_ = -1;
  bool root_exposed_ = false;
  std::string deferred_error_;  // Found where nothing may throw.

  friend struct UnitState;
};

/// See Sharded::initialize.
using FillFunction = std::function<void(const std::string& name, c10::IntArrayRef shape,
                                        int64_t begin, std::span<float> values)>;
void initialize_parameters(ShardedCore& core, const FillFunction& fill);

}  // namespace fsdp
