// Which slot a unit is gathered into and which one its gradients are collected in, and how large
// the slots are.
#pragma once

#include <cstdint>
#include <vector>

#include "libfsdp/plan/layout.h"
#include "libfsdp/plan/strategy.h"

namespace fsdp::plan {

/// A unit has one slot for good, so that addresses never change. The root's slots are the last.
struct SlotMap {
  std::vector<int> slot;                     ///< By unit; -1 = none: not gathered, or no parameter.
  std::vector<int> gradient_slot;            ///< By unit; -1 = nothing trainable.
  std::vector<int> stage;                    ///< By unit; -1 = none: see Placement::stages.
  std::vector<int64_t> slot_bytes;           ///< By slot: its largest unit, in whole pages.
  std::vector<int64_t> gradient_slot_bytes;  ///< Likewise.
  std::vector<int64_t> stage_bytes;          ///< Likewise, of this rank's shards.
  /// By gradient slot, likewise: where a unit's sums are added before they go to the host. Empty
  /// where nothing is offloaded.
  std::vector<int64_t> gradient_stage_bytes;
  int64_t outer_bytes = 0;  ///< A replica's part of a unit's sums; 0 = one level of reduction.

  /// Besides the root's.
  int slots() const { return static_cast<int>(slot_bytes.size()) - 1; }
  int gradient_slots() const { return static_cast<int>(gradient_slot_bytes.size()) - 1; }
};

/// Slots are pages so that neighbours never share one.
inline constexpr int64_t kSlotAlignment = 4096;

/// Units take turns in the placement's slots in the order of their numbers (the order of the
/// modules, which is nearly always that of the calls); a unit never gets the slot of a unit around
/// it; the last `kept_units` units get a slot each. Gradient slots: in turns from the last unit to
/// the first, or one each where gradients are summed unsharded. Stages: all units take turns, the
/// root too. Throws ConfigError when the slots
/// are too few for units inside each other.
SlotMap assign_slots(const Layout& layout, const Placement& placement);

/// Elements of a bucket's gradient shard that each of its replicas sums, and of all of them: the
/// shard and padding.
int64_t outer_part_numel(const Bucket& bucket, const Mesh& mesh);
/// Elements that a bucket's gradient shard occupies: with two levels the parts of all replicas.
int64_t gradient_shard_numel(const Bucket& bucket, const Placement& placement);

}  // namespace fsdp::plan
