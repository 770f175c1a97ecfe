#include "libfsdp/plan/strategy.h"

#include <algorithm>
#include <array>

#include "libfsdp/base/error.h"

namespace fsdp::plan {
namespace {

constexpr std::array<std::string_view, 3> kNames = {"FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"};

}  // namespace

std::string_view strategy_name(Strategy strategy) {
  return kNames.at(static_cast<size_t>(strategy));
}

Strategy strategy_from_name(std::string_view name) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  if (found == kNames.end()) {
    throw ConfigError(
        cat("unknown sharding strategy '", name, "'. Known: FULL_SHARD, SHARD_GRAD_OP, NO_SHARD"));
  }
  return static_cast<Strategy>(found - kNames.begin());
}

std::vector<std::string_view> strategy_names() { return {kNames.begin(), kNames.end()}; }

Placement place(Strategy strategy, int ranks, int units, const PlacementOverrides& overrides) {
  if (overrides.slots < 0 || overrides.gradient_slots < 0) {
    throw ConfigError(cat("slots must be at least 1: got ", overrides.slots, " gather and ",
                          overrides.gradient_slots, " gradient slots"));
  }
  Placement placement;
  const bool replicated = strategy == Strategy::kNoShard;
  placement.mesh = replicated ? Mesh{ranks, 1} : Mesh{1, ranks};
  placement.home =
      placement.mesh.shard == 1 && !overrides.force_slot_home ? Home::kResident : Home::kSlot;
  const int all = std::max(units, 1);
  placement.slots = strategy == Strategy::kFullShard ? 2 : all;
  if (overrides.slots) placement.slots = overrides.slots;
  if (overrides.gradient_slots) placement.gradient_slots = overrides.gradient_slots;
  placement.slots = std::min(placement.slots, all);
  placement.gradient_slots = std::min(placement.gradient_slots, all);
  return placement;
}

}  // namespace fsdp::plan
