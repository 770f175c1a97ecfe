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
  std::vector<int64_t> slot_bytes;           ///< By slot: its largest unit, in whole pages.
  std::vector<int64_t> gradient_slot_bytes;  ///< Likewise.

  /// Besides the root's.
  int slots() const { return static_cast<int>(slot_bytes.size()) - 1; }
  int gradient_slots() const { return static_cast<int>(gradient_slot_bytes.size()) - 1; }
};

/// Slots are pages so that neighbours never share one.
inline constexpr int64_t kSlotAlignment = 4096;

/// Units take turns in the placement's slots in the order of their numbers (the order of the
/// modules, which is nearly always that of the calls); a unit never gets the slot of a unit around
/// it; the last `kept_units` units get a slot each. Gradient slots: in turns from the last unit to
/// the first, or one each where gradients are summed unsharded. Throws ConfigError when the slots
/// are too few for units inside each other.
SlotMap assign_slots(const Layout& layout, const Placement& placement);

}  // namespace fsdp::plan
