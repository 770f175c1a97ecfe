// The only place (with the options above `shard`) that knows the strategies' names: each becomes
// values of a plan.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "libfsdp/plan/mesh.h"

namespace fsdp::plan {

enum class Strategy { kFullShard, kShardGradOp, kHybridShard, kHybridShardZero2, kNoShard };

/// "FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2", "NO_SHARD".
std::string_view strategy_name(Strategy strategy);
/// Inverse (also "_HYBRID_SHARD_ZERO2", PyTorch's name); throws ConfigError that lists the names.
Strategy strategy_from_name(std::string_view name);
/// The names, for help texts.
std::vector<std::string_view> strategy_names();

/// Where a unit's full parameters live during a step.
enum class Home {
  kSlot,      ///< Gathered into a slot of the arena before use.
  kResident,  ///< The shard is the whole bucket: parameters are views of it, nothing is gathered.
  kShared,  ///< The shard group's members are on one host and keep the bucket once, in memory that
            ///< all map: parameters are views of it, a fence a step takes the place of gathers.
};

/// Where the gradients of a step's micro-batches are summed.
enum class Accumulation {
  kSharded,    ///< Reduced after every micro-batch, summed in this rank's fp32 shard.
  kUnsharded,  ///< Summed in a gradient slot of each unit, in fp32, and reduced once a step.
};

/// Over whom a micro-batch's gradients are summed, where there are replicas.
enum class Reduction {
  kWorld,     ///< All ranks, in rank order: one left fold over all micro-batches of a step.
  kTwoLevel,  ///< The shard group; then, once a step, the replicas. Less traffic between groups,
              ///< sums that depend on the mesh in their last bits.
};

/// What of a rank's state lies in the host's memory when it computes on a device.
enum class Offload {
  kNone,
  kOptimizer,   ///< Optimizer state, masters, gradient shards; the parameters' shards are there too
                ///< and brought to the device once a step.
  kParameters,  ///< Likewise, but parameters' shards are brought for each gather.
};

/// What a strategy means for a plan.
struct Placement {
  Mesh mesh;
  Home home = Home::kSlot;
  int slots = 2;       ///< Gather slots that the units take turns in; the root has one of its own.
  int kept_units = 0;  ///< So many units, the last ones, have a slot each: gathered once a step.
  int gradient_slots = 2;  ///< Gradient slots that the units take turns in; the root has its own.
  Accumulation accumulation = Accumulation::kSharded;
  Reduction reduction = Reduction::kWorld;
  /// Shards lie in the host's memory and are brought into so many stages, from which gathers read;
  /// units take turns in them. 0 = shards lie where gathers read them.
  int stages = 0;

  bool offloads() const { return stages > 0; }
};

/// What a user or a test may force; 0 or false = the strategy's own choice.
struct PlacementOverrides {
  int slots = 0;
  int gradient_slots = 0;
  int kept_units = -1;           ///< -1 = the strategy's own choice.
  int sharding_group_size = 0;   ///< HYBRID_SHARD: ranks that divide the parameters among them.
  bool force_slot_home = false;  ///< Neither resident nor shared.
  Accumulation accumulation = Accumulation::kSharded;
  bool two_level = false;  ///< Reduction::kTwoLevel on one host, too.
  Offload offload = Offload::kNone;
  int64_t memory_budget_bytes = 0;  ///< See fit_to_budget().
};

/// What the strategies need to know of ranks and model.
struct PlaceInput {
  int ranks = 1;
  int ranks_per_host = 0;    ///< 0 = all of them.
  bool can_share = false;    ///< Ranks of one host can map the same memory.
  int units = 0;             ///< Besides the root.
  int nesting_depth = 1;     ///< See Layout::nesting_depth.
  bool exact_order = false;  ///< Sums must not depend on the mesh.
};

/// Values for `strategy`.
///
/// FULL_SHARD: two slots. SHARD_GRAD_OP: every unit is kept. HYBRID_SHARD: replicas of shard groups
/// of `sharding_group_size` ranks, by default those of one host, two slots; HYBRID_SHARD_ZERO2
/// likewise with every unit kept. NO_SHARD: a shard group of one. A shard group of one rank makes
/// the home resident, one on a single host with `can_share` shared; what is offloaded is gathered
/// into slots. Replicas on several hosts reduce in two levels unless the order of sums must be
/// exact. Throws ConfigError for overrides that cannot work: fewer slots than units inside each
/// other, a group size that does not divide the ranks, two levels in exact order.
Placement place(Strategy strategy, const PlaceInput& input,
                const PlacementOverrides& overrides = {});

}  // namespace fsdp::plan
