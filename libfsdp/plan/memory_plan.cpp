#include "libfsdp/plan/memory_plan.h"

#include <algorithm>
#include <array>
#include <iomanip>
#include <sstream>
#include <string_view>
#include <utility>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"
#include "libfsdp/plan/slots.h"

namespace fsdp::plan {
namespace {

// Unsharded sums stay in their slots, unless replicas read them there too.
bool sums_in_slot(const Bucket& bucket, const Placement& placement) {
  return placement.accumulation == Accumulation::kUnsharded && placement.mesh.replicate == 1 &&
         !placement.offloads() && bucket.reduce_dtype == DType::kF32;
}

// Arrays begin on pages, but for the sums that replicas read in place: those lie end to end.
int64_t gradient_shard_bytes(const Bucket& bucket, const Placement& placement) {
  const auto bytes = [](int64_t numel) {
    return checked_mul<ConfigError>(numel, sizeof(float), "gradient shard");
  };
  if (placement.reduction == Reduction::kTwoLevel && !placement.offloads())
    return bytes(gradient_shard_numel(bucket, placement));
  return round_up(bytes(bucket.shard_numel), kSlotAlignment);
}

void add_shards(const Bucket& bucket, const Placement& placement, const StateBytes& state,
                MemoryPlan& plan) {
  plan.parameter_shards =
      checked_add<ConfigError>(plan.parameter_shards, bucket.shard_bytes(), "parameter shards");
  if (!bucket.trainable) return;
  plan.masters =
      checked_add<ConfigError>(plan.masters, state.master(bucket), "masters of parameters");
  if (!sums_in_slot(bucket, placement)) {
    plan.gradient_shards = checked_add<ConfigError>(
        plan.gradient_shards, gradient_shard_bytes(bucket, placement), "gradient shards");
  }
}

// "1234567 bytes" as "1.18 MiB".
std::string human_bytes(int64_t bytes) {
  constexpr std::array<std::string_view, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024.0 && unit + 1 < kUnits.size()) {
    value /= 1024.0;
    ++unit;
  }
  std::ostringstream out;
  out << std::fixed << std::setprecision(unit == 0 ? 0 : 2) << value << ' ' << kUnits[unit];
  return out.str();
}

}  // namespace

int64_t MemoryPlan::state() const {
  return parameter_shards + masters + gradient_shards + optimizer_state;
}

std::string MemoryPlan::to_string() const {
  const std::array<std::pair<std::string_view, int64_t>, 11> rows = {{
      {"parameter shards", parameter_shards},
      {"masters", masters},
      {"gradient shards", gradient_shards},
      {"optimizer state", optimizer_state},
      {"gather slots", gather_slots},
      {"gradient slots", gradient_slots},
      {"root's slots", root_slots},
      {"stages", stages},
      {"outer slot", outer_slot},
      {"total", total()},
      {"on the host", offloads ? state() : 0},
  }};
  constexpr size_t kAlwaysShown = 7;
  std::ostringstream out;
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto& [name, bytes] = rows[i];
    if (i >= kAlwaysShown && bytes == 0) continue;
    out << std::left << std::setw(18) << name << std::right << std::setw(12) << human_bytes(bytes)
        << '\n';
  }
  return out.str();
}

MemoryPlan plan_memory(const Layout& layout, const Placement& placement, const StateBytes& state) {
  MemoryPlan plan;
  for (const Bucket& bucket : layout.buckets) add_shards(bucket, placement, state, plan);
  if (placement.offloads()) plan.parameter_shards = round_up(plan.parameter_shards, kSlotAlignment);
  plan.optimizer_state = state.optimizer;
  const SlotMap slots = assign_slots(layout, placement);
  for (const int64_t bytes : slots.slot_bytes)
    plan.gather_slots = checked_add<ConfigError>(plan.gather_slots, bytes, "gather slots");
  for (const int64_t bytes : slots.gradient_slot_bytes)
    plan.gradient_slots = checked_add<ConfigError>(plan.gradient_slots, bytes, "gradient slots");
  plan.root_slots = slots.slot_bytes.back() + slots.gradient_slot_bytes.back();
  for (const int64_t bytes : slots.stage_bytes)
    plan.stages = checked_add<ConfigError>(plan.stages, bytes, "stages");
  for (const int64_t bytes : slots.gradient_stage_bytes)
    plan.stages = checked_add<ConfigError>(plan.stages, bytes, "gradient stages");
  plan.outer_slot = slots.outer_bytes;
  plan.offloads = placement.offloads();
  plan.gather_slots -= slots.slot_bytes.back();
  plan.gradient_slots -= slots.gradient_slot_bytes.back();
  return plan;
}

Placement fit_to_budget(const Layout& layout, Placement placement, const StateBytes& state,
                        int64_t budget_bytes) {
  const int units = static_cast<int>(layout.units.size()) - 1;
  // A placement that keeps units may have too few slots for turns, as those units took none.
  const int turns = placement.kept_units > 0
                        ? std::max({placement.slots, 2, layout.nesting_depth() + 1})
                        : placement.slots;
  int64_t needed = 0;
  for (int kept = placement.home == Home::kSlot ? units : 0; kept >= 0; --kept) {
    placement.kept_units = kept;
    placement.slots = std::min(turns, units - kept);
    if (kept > 0 && placement.slots < std::min(layout.nesting_depth(), units - kept)) continue;
    needed = plan_memory(layout, placement, state).total();
    if (needed <= budget_bytes) return placement;
  }
  throw DoesNotFitError(cat("the plan needs at least ", human_bytes(needed),
                            " a rank, the memory budget is ", human_bytes(budget_bytes),
                            ". Hint: more ranks, bf16 parameters or fewer bytes of optimizer "
                            "state."));
}

}  // namespace fsdp::plan
