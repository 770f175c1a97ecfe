// What a user of fully_shard() can choose.
#pragma once

#include <c10/util/ArrayRef.h>

#include <functional>
#include <string>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/optim/optimizer.h"
#include "libfsdp/plan/strategy.h"

namespace fsdp {

struct ShardOptions {
  plan::Strategy strategy = plan::Strategy::kFullShard;
  /// Of gathered parameters, activations and gradients on the wire: kF32, or kBF16 with an exact
  /// fp32 master.
  DType param_dtype = DType::kF32;
  /// Keep a unit's inputs only, and run its forward again in backward.
  bool activation_checkpointing = false;
  /// Same bits at any number of ranks and under every strategy: one thread per rank, deterministic
  /// algorithms.
  bool deterministic = false;
  optim::OptimizerOptions optimizer;
  /// Rate scale and weight decay of groups of parameters.
  std::vector<optim::ParamGroup> groups = {{.name = "all"}};
  /// Group of a parameter, an index into `groups`; null = group 0 for all.
  std::function<int(const std::string& name, c10::IntArrayRef shape)> param_group;
  /// Zero or false = the strategy's own choice.
  plan::PlacementOverrides placement;
  /// Fill a slot with NaN when its contents end: for tests.
  bool poison = false;
};

/// `options` with what the environment forces: FSDP_SLOTS, FSDP_GRADIENT_SLOTS (numbers),
/// FSDP_HOME=slot, FSDP_POISON=1. Throws ConfigError for other values.
ShardOptions with_environment(ShardOptions options);

}  // namespace fsdp
