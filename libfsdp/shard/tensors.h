// Parameters and gradients of a sharded module as tensors: this rank's pieces, or whole ones by
// name.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "libfsdp/shard/sharded_core.h"

namespace fsdp {

/// What this rank owns of one parameter, one contiguous piece of it.
struct LocalShard {
  std::string name;
  int64_t param_at = 0;  ///< First element, in the flattened parameter.
  at::Tensor value;      ///< [numel], fp32, a leaf that requires grad: the master itself.
};

/// This rank's pieces of all trainable parameters, for an optimizer of torch::optim.
///
/// `value` is a view of the master: what an optimizer writes there inside Step::finish_with is the
/// parameter of the next step. Its grad() is a view of the gradient's sum, which holds the gradient
/// of the mean loss, clipped, inside finish_with. Pieces of parameters without elements here are
/// left out; under replication all replicas hold the same pieces and must update them alike.
/// Throws ConfigError for parameters whose master is split or missing (see MasterPrecision::kF32).
std::vector<LocalShard> local_shards(ShardedCore& core);

/// A whole parameter on every rank, fp32, exact. Collective; cost: one broadcast for each rank of a
/// shard group. Throws ConfigError that lists similar names.
at::Tensor full_parameter(ShardedCore& core, const std::string& name);

/// The gradient of the sum of losses over all ranks and micro-batches, fp32 (times the loss scale
/// where there is one). Collective; between Step::complete_gradients and the step's finish. Throws
/// ConfigError elsewhere, and for a frozen parameter.
at::Tensor full_gradient(ShardedCore& core, const std::string& name);

}  // namespace fsdp
