// All memory that one rank's engine owns, allocated once: shards, slots, gradient shards.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/device/host_arena.h"
#include "libfsdp/plan/layout.h"
#include "libfsdp/plan/strategy.h"

namespace fsdp::engine {

/// Note [Slots]
/// Slot number placement.slots is the root's, the ones below are shared by the units; gradient
/// slots likewise. A unit's buckets lie end to end in its slot, in the order of Layout::of_unit, so
/// a bucket's address in a slot never changes.
class Storage {
 public:
  /// Collective: peers read each other's shards and gradient slots, so those lie in symmetric
  /// memory.
  Storage(const plan::Layout& layout, const plan::Placement& placement, comm::Communicator& comm);

  const plan::Layout& layout() const { return layout_; }

  /// This rank's part of a bucket, in the bucket's dtype: what gathers read.
  std::byte* shard(int bucket);
  comm::SymmetricSpan shard_source(int bucket);
  /// The 16 bits per element that make a trainable bf16 shard an exact fp32 master; null for other
  /// buckets.
  uint16_t* remainder(int bucket);
  /// fp32 sums of this rank's part; empty for frozen buckets.
  std::span<float> gradient_shard(int bucket);

  /// Where the whole bucket lies when its unit is in `slot`; slot -1 = resident: the shard itself.
  std::byte* gathered(int slot, int bucket);
  /// Where the bucket's gradient of one micro-batch is collected, in the bucket's dtype.
  std::byte* gradient(int gradient_slot, int bucket);
  comm::SymmetricSpan gradient_source(int gradient_slot, int bucket);
  /// The whole slot, for poisoning.
  std::span<std::byte> slot(int slot);
  /// Whether `address` lies in any slot, or in a shard.
  bool contains(const void* address) const;

  /// Writes / reads fp32 values at element `at` of this rank's part; exact for trainable buckets of
  /// any dtype. Throws InternalError outside of the part.
  void store(int bucket, int64_t at, std::span<const float> values);
  void load(int bucket, int64_t at, std::span<float> values) const;

  int64_t allocated_bytes() const { return allocated_bytes_; }

 private:
  struct Place {
    int64_t shard_offset = 0;  // In symmetric shard memory.
    int64_t in_slot = 0;       // From the slot's begin.
    int64_t in_gradient_slot = 0;
    std::span<float> gradient;
    uint16_t* remainder = nullptr;
  };
  void place_buckets();
  void allocate(comm::Communicator& comm);

  plan::Layout layout_;
  plan::Placement placement_;
  std::vector<Place> places_;
  int64_t shard_bytes_ = 0;
  int64_t slot_bytes_ = 0;  // Of the units' slots.
  int64_t root_slot_bytes_ = 0;
  int64_t gradient_slot_bytes_ = 0;
  int64_t root_gradient_bytes_ = 0;
  int64_t allocated_bytes_ = 0;
  std::shared_ptr<comm::SymmetricMemory> shards_;
  std::shared_ptr<comm::SymmetricMemory> gradients_;
  std::unique_ptr<device::HostArena> arena_;
  std::byte* slots_ = nullptr;
};

}  // namespace fsdp::engine
