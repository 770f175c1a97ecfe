// The only place (with the options above `shard`) that knows the strategies' names: each becomes
// values of a plan.
#pragma once

#include <string_view>
#include <vector>

#include "libfsdp/plan/mesh.h"

namespace fsdp::plan {

enum class Strategy { kFullShard, kShardGradOp, kNoShard };

/// "FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD".
std::string_view strategy_name(Strategy strategy);
/// Inverse; throws ConfigError that lists the names.
Strategy strategy_from_name(std::string_view name);
/// The names, for help texts.
std::vector<std::string_view> strategy_names();

/// Where a unit's full parameters live during a step.
enum class Home {
  kSlot,      ///< Gathered into a slot of the arena before use.
  kResident,  ///< The shard is the whole bucket: parameters are views of it, nothing is gathered.
};

/// What a strategy means for a plan.
struct Placement {
  Mesh mesh;
  Home home = Home::kSlot;
  int slots = 2;           ///< Gather slots shared by the units; the root has one of its own.
  int gradient_slots = 2;  ///< Gradient slots shared by the units; the root has one of its own.
};

/// What a user or a test may force; 0 or false = the strategy's own choice.
struct PlacementOverrides {
  int slots = 0;
  int gradient_slots = 0;
  bool force_slot_home = false;
};

/// Values for `strategy` on `ranks` ranks and a model of `units` units besides the root.
///
/// FULL_SHARD: two slots. SHARD_GRAD_OP: a slot a unit. NO_SHARD: a shard group of one. A shard
/// group of one rank makes the home resident. Throws ConfigError for overrides that cannot work
/// (fewer than one slot).
Placement place(Strategy strategy, int ranks, int units, const PlacementOverrides& overrides = {});

}  // namespace fsdp::plan
