#include "libfsdp/plan/memory_plan.h"

#include <algorithm>
#include <array>
#include <iomanip>
#include <sstream>
#include <string_view>
#include <utility>

#include "libfsdp/base/checked.h"

namespace fsdp::plan {
namespace {

// Bytes of a unit's gradient slot: its trainable buckets in their own dtypes.
int64_t gradient_bytes(const Layout& layout, int unit) {
  int64_t bytes = 0;
  for (const int b : layout.of_unit[static_cast<size_t>(unit)]) {
    const Bucket& bucket = layout.buckets[static_cast<size_t>(b)];
    if (bucket.trainable) bytes += bucket.padded_bytes();
  }
  return bytes;
}

void add_shards(const Bucket& bucket, bool split_master, int64_t optimizer_bytes_per_parameter,
                MemoryPlan& plan) {
  plan.parameter_shards =
      checked_add<ConfigError>(plan.parameter_shards, bucket.shard_bytes(), "parameter shards");
  if (!bucket.trainable) return;
  if (split_master && bucket.dtype == DType::kBF16) {
    plan.master_remainders += bucket.shard_numel * static_cast<int64_t>(sizeof(uint16_t));
  }
  plan.gradient_shards = checked_add<ConfigError>(
      plan.gradient_shards,
      checked_mul<ConfigError>(bucket.shard_numel, sizeof(float), "gradient shard"),
      "gradient shards");
  plan.optimizer_state = checked_add<ConfigError>(
      plan.optimizer_state,
      checked_mul<ConfigError>(bucket.shard_numel, optimizer_bytes_per_parameter,
                               "optimizer state"),
      "optimizer state");
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

int64_t MemoryPlan::total() const {
  return parameter_shards + master_remainders + gradient_shards + optimizer_state + transient();
}

std::string MemoryPlan::to_string() const {
  const std::array<std::pair<std::string_view, int64_t>, 8> rows = {{
      {"parameter shards", parameter_shards},
      {"master remainders", master_remainders},
      {"gradient shards", gradient_shards},
      {"optimizer state", optimizer_state},
      {"gather slots", gather_slots},
      {"gradient slots", gradient_slots},
      {"root's slots", root_slots},
      {"total", total()},
  }};
  std::ostringstream out;
  for (const auto& [name, bytes] : rows) {
    out << std::left << std::setw(18) << name << std::right << std::setw(12) << human_bytes(bytes)
        << '\n';
  }
  return out.str();
}

MemoryPlan plan_memory(const Layout& layout, const Placement& placement, bool split_master,
                       int64_t optimizer_bytes_per_parameter) {
  MemoryPlan plan;
  for (const Bucket& bucket : layout.buckets)
    add_shards(bucket, split_master, optimizer_bytes_per_parameter, plan);
  int64_t largest_unit = 0;
  int64_t largest_gradient = 0;
  for (int unit = 1; unit < static_cast<int>(layout.units.size()); ++unit) {
    largest_unit = std::max(largest_unit, layout.unit_bytes(unit));
    largest_gradient = std::max(largest_gradient, gradient_bytes(layout, unit));
  }
  const bool has_root = !layout.units.empty();
  const bool slots = placement.home == Home::kSlot;
  if (slots)
    plan.gather_slots = checked_mul<ConfigError>(placement.slots, largest_unit, "gather slots");
  plan.gradient_slots =
      checked_mul<ConfigError>(placement.gradient_slots, largest_gradient, "gradient slots");
  if (has_root) plan.root_slots = (slots ? layout.unit_bytes(0) : 0) + gradient_bytes(layout, 0);
  return plan;
}

}  // namespace fsdp::plan
