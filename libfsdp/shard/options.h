// What a user of fully_shard() can choose.
#pragma once

#include <c10/util/ArrayRef.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/engine/storage.h"
#include "libfsdp/optim/loss_scaler.h"
#include "libfsdp/optim/optimizer.h"
#include "libfsdp/plan/strategy.h"

namespace fsdp {

struct ShardOptions {
  plan::Strategy strategy = plan::Strategy::kFullShard;
  /// Of gathered parameters, and so of activations: kF32, kBF16 or kF16; without, each parameter
  /// keeps its own.
  std::optional<DType> param_dtype = DType::kF32;
  /// Of gradients as they are sent; without, that of the parameter. Sums are fp32.
  std::optional<DType> reduce_dtype;
  /// What is kept of trainable 16-bit parameters besides what the model computes with.
  engine::MasterPrecision master = engine::MasterPrecision::kSplit;
  /// Keep a unit's inputs only, and run its forward again in backward. Units inside it are run
  /// again with it.
  bool activation_checkpointing = false;
  /// Same bits at any number of ranks and under every strategy: one thread per rank, deterministic
  /// algorithms, no random numbers from a global generator.
  bool deterministic = false;
  /// Of fsdp::dropout and of stochastic rounding.
  uint64_t seed = 0;
  /// Multiplies losses before backward so that small gradients survive fp16; a step whose gradient
  /// overflows is skipped. Without, fp16 parameters get PyTorch's defaults. The first scale is that
  /// of the mean loss: see LossScaler::start.
  std::optional<optim::LossScalerOptions> loss_scaler;
  optim::OptimizerOptions optimizer;
  /// Rate scale and weight decay of groups of parameters.
  std::vector<optim::ParamGroup> groups = {{.name = "all"}};
  /// Group of a parameter, an index into `groups`; null = group 0 for all.
  std::function<int(const std::string& name, c10::IntArrayRef shape)> param_group;
  /// Parameters that belong to the root, whatever unit their module lies in: gathered once a step,
  /// as adapters of all units are; null = none.
  std::function<bool(const std::string& name)> in_root;
  /// Zero or false = the strategy's own choice.
  plan::PlacementOverrides placement;
  /// Look for races in every schedule that is compiled; costs milliseconds a schedule.
#ifdef NDEBUG
  bool verify_plans = false;
#else
  bool verify_plans = true;
#endif
  /// Fill a slot with NaN when its contents end: for tests.
  bool poison = false;

  /// Throws ConfigError for a combination that cannot work.
  void validate() const;
};

/// `options` with what the environment forces: FSDP_SLOTS, FSDP_GRADIENT_SLOTS, FSDP_KEPT_UNITS
/// (numbers), FSDP_HOME=slot, FSDP_POISON=1, FSDP_CHECK_PLANS=1. Throws ConfigError for other
/// values.
ShardOptions with_environment(ShardOptions options);

}  // namespace fsdp
