#include "libfsdp/plan/slots.h"

#include <algorithm>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"

namespace fsdp::plan {
namespace {

constexpr int kRoot = 0;
constexpr int64_t kFloatBytes = sizeof(float);

size_t at(int index) { return static_cast<size_t>(index); }

void grow(int64_t& slot, int64_t bytes) { slot = std::max(slot, round_up(bytes, kSlotAlignment)); }

class Assigner {
 public:
  Assigner(const Layout& layout, const Placement& placement)
      : layout_(layout), placement_(placement), units_(static_cast<int>(layout.units.size())) {
    map_.slot.assign(layout.units.size(), -1);
    map_.gradient_slot.assign(layout.units.size(), -1);
    map_.stage.assign(layout.units.size(), -1);
  }

  SlotMap run() {
    const bool slots = placement_.home == Home::kSlot;
    map_.slot_bytes.assign(slots ? at(placement_.slots) : 0, 0);
    if (slots) {
      for (int unit = 1; unit < units_; ++unit) place(unit);
      if (units_ > 0 && layout_.unit_bytes(kRoot) > 0) {
        map_.slot[kRoot] = static_cast<int>(map_.slot_bytes.size());
      }
    }
    map_.slot_bytes.push_back(
        slots && units_ > 0 ? round_up(layout_.unit_bytes(kRoot), kSlotAlignment) : 0);
    place_gradients();
    place_stages();
    return std::move(map_);
  }

 private:
  // A unit without parameters of its own still counts as one of the last.
  bool kept(int unit) const { return unit >= units_ - placement_.kept_units; }

  void place(int unit) {
    const int64_t bytes = layout_.unit_bytes(unit);
    if (bytes == 0) return;
    if (kept(unit)) {
      map_.slot[at(unit)] = static_cast<int>(map_.slot_bytes.size());
      map_.slot_bytes.push_back(round_up(bytes, kSlotAlignment));
      return;
    }
    for (int tried = 0; tried < placement_.slots; ++tried) {
      const int slot = next_++ % placement_.slots;
      if (held_around(unit, slot)) continue;
      map_.slot[at(unit)] = slot;
      grow(map_.slot_bytes[at(slot)], bytes);
      return;
    }
    throw ConfigError(cat("unit '", layout_.units[at(unit)].name,
                          "' is gathered while the units around it are: got ", placement_.slots,
                          " slots, need at least ", layout_.nesting_depth()));
  }

  bool held_around(int unit, int slot) const {
    for (int around = layout_.units[at(unit)].parent; around != kRoot;
         around = layout_.units[at(around)].parent) {
      if (map_.slot[at(around)] == slot) return true;
    }
    return false;
  }

  void place_gradients() {
    const bool own = placement_.accumulation == Accumulation::kUnsharded;
    map_.gradient_slot_bytes.assign(own ? 0 : at(placement_.gradient_slots), 0);
    int turn = 0;
    for (int unit = units_ - 1; unit > kRoot; --unit) {
      const int64_t bytes = gradient_bytes(unit);
      if (bytes == 0) continue;
      if (own) map_.gradient_slot_bytes.push_back(0);
      const int slot = own ? turn : turn % placement_.gradient_slots;
      ++turn;
      map_.gradient_slot[at(unit)] = slot;
      grow(map_.gradient_slot_bytes[at(slot)], bytes);
    }
    const int64_t root = units_ > 0 ? gradient_bytes(kRoot) : 0;
    if (root > 0) map_.gradient_slot[kRoot] = map_.gradient_slots() + 1;
    map_.gradient_slot_bytes.push_back(round_up(root, kSlotAlignment));
  }

  int64_t gradient_bytes(int unit) const { return layout_.gradient_bytes(unit); }

  void place_stages() {
    map_.stage_bytes.assign(at(placement_.stages), 0);
    if (placement_.offloads()) map_.gradient_stage_bytes.assign(map_.gradient_slot_bytes.size(), 0);
    int turn = 0;
    for (int unit = kRoot; unit < units_; ++unit) {
      int64_t shards = 0;
      int64_t sums = 0;
      int64_t outer = 0;
      for (const int b : layout_.of_unit[at(unit)]) {
        const Bucket& bucket = layout_.buckets[at(b)];
        shards += bucket.shard_bytes();
        if (!bucket.trainable) continue;
        sums += gradient_shard_numel(bucket, placement_) * kFloatBytes;
        outer += outer_part_numel(bucket, placement_.mesh) * kFloatBytes;
      }
      if (placement_.reduction == Reduction::kTwoLevel) grow(map_.outer_bytes, outer);
      if (!placement_.offloads() || shards == 0) continue;
      map_.stage[at(unit)] = turn++ % placement_.stages;
      grow(map_.stage_bytes[at(map_.stage[at(unit)])], shards);
      if (sums > 0) grow(map_.gradient_stage_bytes[at(map_.gradient_slot[at(unit)])], sums);
    }
  }

  const Layout& layout_;
  const Placement& placement_;
  const int units_;
  int next_ = 0;
  SlotMap map_;
};

}  // namespace

int64_t outer_part_numel(const Bucket& bucket, const Mesh& mesh) {
  constexpr int64_t kQuantum = 64;  // Parts begin on cache lines.
  return round_up((bucket.shard_numel + mesh.replicate - 1) / mesh.replicate, kQuantum);
}

int64_t gradient_shard_numel(const Bucket& bucket, const Placement& placement) {
  if (placement.reduction != Reduction::kTwoLevel) return bucket.shard_numel;
  return outer_part_numel(bucket, placement.mesh) * placement.mesh.replicate;
}

SlotMap assign_slots(const Layout& layout, const Placement& placement) {
  return Assigner(layout, placement).run();
}

}  // namespace fsdp::plan
