#include "libfsdp/plan/strategy.h"

#include <algorithm>
#include <array>

#include "libfsdp/base/error.h"

namespace fsdp::plan {
namespace {

constexpr std::array<std::string_view, 5> kNames = {"FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD",
                                                    "HYBRID_SHARD_ZERO2", "NO_SHARD"};

bool is_hybrid(Strategy strategy) {
  return strategy == Strategy::kHybridShard || strategy == Strategy::kHybridShardZero2;
}

Mesh make_mesh(Strategy strategy, const PlaceInput& input, const PlacementOverrides& overrides) {
  if (overrides.sharding_group_size != 0 && !is_hybrid(strategy)) {
    throw ConfigError(cat("sharding_group_size ", overrides.sharding_group_size, " with ",
                          strategy_name(strategy), ": it belongs to HYBRID_SHARD"));
  }
  if (strategy == Strategy::kNoShard) return {input.ranks, 1};
  if (!is_hybrid(strategy)) return {1, input.ranks};
  const int host = input.ranks_per_host > 0 ? input.ranks_per_host : input.ranks;
  const int group = overrides.sharding_group_size ? overrides.sharding_group_size : host;
  if (group < 1 || input.ranks % group != 0) {
    throw ConfigError(cat("sharding_group_size ", group, " does not divide ", input.ranks,
                          " ranks into equal groups"));
  }
  return {input.ranks / group, group};
}

// Groups are neighbouring ranks, so a group that divides a host's ranks lies on one host.
bool group_on_one_host(const Mesh& mesh, const PlaceInput& input) {
  const int host = input.ranks_per_host > 0 ? input.ranks_per_host : input.ranks;
  return host % mesh.shard == 0;
}

Home make_home(const Mesh& mesh, const PlaceInput& input, const PlacementOverrides& overrides) {
  if (overrides.force_slot_home || overrides.offload != Offload::kNone) return Home::kSlot;
  if (mesh.shard == 1) return Home::kResident;
  return input.can_share && group_on_one_host(mesh, input) ? Home::kShared : Home::kSlot;
}

Reduction make_reduction(const Mesh& mesh, const PlaceInput& input,
                         const PlacementOverrides& overrides) {
  if (overrides.two_level && input.exact_order) {
    throw ConfigError(
        "a reduction in two levels in deterministic mode: its sums depend on the mesh");
  }
  const bool hosts = input.ranks_per_host > 0 && input.ranks_per_host < input.ranks;
  const bool two = mesh.replicate > 1 && !input.exact_order && (hosts || overrides.two_level);
  return two ? Reduction::kTwoLevel : Reduction::kWorld;
}

int make_stages(Offload offload, int units) {
  switch (offload) {
    case Offload::kNone:
      return 0;
    case Offload::kOptimizer:
      return units + 1;
    case Offload::kParameters:
      return std::min(2, units + 1);
  }
  throw InternalError("unknown kind of offload");
}

void refuse_too_few_slots(int slots, int kept, const PlaceInput& input) {
  const int needed = std::min(input.nesting_depth, input.units - kept);
  if (slots >= needed) return;
  throw ConfigError(cat("units lie inside each other ", input.nesting_depth,
                        " deep and are gathered at the same time: got ", slots,
                        " slots, need at least ", needed));
}

}  // namespace

std::string_view strategy_name(Strategy strategy) {
  return kNames.at(static_cast<size_t>(strategy));
}

Strategy strategy_from_name(std::string_view name) {
  if (name == "_HYBRID_SHARD_ZERO2") return Strategy::kHybridShardZero2;
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  if (found == kNames.end()) {
    throw ConfigError(cat("unknown sharding strategy '", name,
                          "'. Known: FULL_SHARD, SHARD_GRAD_OP, HYBRID_SHARD, HYBRID_SHARD_ZERO2, "
                          "NO_SHARD"));
  }
  return static_cast<Strategy>(found - kNames.begin());
}

std::vector<std::string_view> strategy_names() { return {kNames.begin(), kNames.end()}; }

Placement place(Strategy strategy, const PlaceInput& input, const PlacementOverrides& overrides) {
  if (overrides.slots < 0 || overrides.gradient_slots < 0 || overrides.kept_units < -1) {
    throw ConfigError(cat("slots must be at least 1 and kept units at least 0: got ",
                          overrides.slots, " gather and ", overrides.gradient_slots,
                          " gradient slots, ", overrides.kept_units, " kept units"));
  }
  Placement placement;
  placement.mesh = make_mesh(strategy, input, overrides);
  placement.home = make_home(placement.mesh, input, overrides);
  placement.accumulation = overrides.accumulation;
  placement.reduction = make_reduction(placement.mesh, input, overrides);
  placement.stages = make_stages(overrides.offload, input.units);
  const bool keeps = strategy == Strategy::kShardGradOp || strategy == Strategy::kHybridShardZero2;
  placement.kept_units = keeps && overrides.slots == 0 ? input.units : 0;
  if (overrides.kept_units >= 0) placement.kept_units = std::min(overrides.kept_units, input.units);
  const int turns = input.units - placement.kept_units;  // Units that take turns.
  // One more than lie inside each other, so that the next one can be on its way.
  placement.slots = overrides.slots ? overrides.slots : std::max(2, input.nesting_depth + 1);
  placement.slots = std::min(placement.slots, turns);
  refuse_too_few_slots(placement.slots, placement.kept_units, input);
  if (overrides.gradient_slots) placement.gradient_slots = overrides.gradient_slots;
  placement.gradient_slots = std::clamp(placement.gradient_slots, 1, std::max(input.units, 1));
  return placement;
}

}  // namespace fsdp::plan
