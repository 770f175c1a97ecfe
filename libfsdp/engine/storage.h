// All memory that one rank's engine owns, allocated once: shards, slots, gradient shards.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/kernels/compute.h"
#include "libfsdp/plan/layout.h"
#include "libfsdp/plan/memory_plan.h"
#include "libfsdp/plan/slots.h"
#include "libfsdp/plan/strategy.h"

namespace fsdp::engine {

/// What is kept of trainable 16-bit parameters besides what the model computes with.
enum class MasterPrecision {
  kSplit,  ///< bf16: 16 bits more, together an exact fp32 master. f16: as kF32.
  kF32,    ///< An fp32 master apart.
  kNone,   ///< Nothing: the 16 bits are the parameter (bf16 only).
};

/// Bytes that a rank keeps beside the shard of `bucket`, in whole pages.
int64_t master_bytes(const plan::Bucket& bucket, MasterPrecision precision);

/// Note [Slots]
/// The root's slot is the last, the ones below are the units'; gradient slots likewise. A unit's
/// buckets lie end to end in its slot, in the order of Layout::of_unit, so a bucket's address in a
/// slot never changes.
///
/// Note [Sums in place]
/// Where a unit's gradient slot is its own and each rank's part of it is read by that rank alone
/// (no replicas), the reduction may leave the sum there: the gradient shard needs no memory. With
/// unsharded sums that is so for good; else for the root as long as steps have one micro-batch.
class Storage {
 public:
  /// Collective: peers read each other's shards and gradient slots, so those lie in symmetric
  /// memory, in the shared home the shards in memory that the shard group holds once.
  Storage(const plan::Layout& layout, const plan::Placement& placement, comm::Communicator& comm,
          MasterPrecision precision);

  /// Where slots and stages lie: that of the communicator, which outlives this.
  kernels::Compute& compute() const { return *compute_; }
  /// Where shards, masters and sums lie: the same, or the host's. See Note [Offload].
  kernels::Compute& home() const { return *home_; }
  /// Between the two; null where nothing is offloaded.
  kernels::CopyStream* copies() const { return copies_.get(); }
  const plan::Layout& layout() const { return layout_; }
  const plan::SlotMap& slots() const { return slots_; }

  /// This rank's part of a bucket, in the bucket's dtype.
  std::byte* shard(int bucket);
  /// Where it is brought to when it is offloaded.
  std::byte* stage(int bucket);
  /// What gathers read: one or the other.
  comm::SymmetricSpan shard_source(int bucket);
  /// The 16 bits per element that make a bf16 shard an exact fp32 master; null for other buckets.
  uint16_t* remainder(int bucket) { return places_[static_cast<size_t>(bucket)].remainder; }
  /// The fp32 master apart from a 16-bit shard; null for other buckets.
  float* master(int bucket) { return places_[static_cast<size_t>(bucket)].master; }
  /// fp32 sums of this rank's part; empty for frozen buckets. See Note [Sums in place].
  std::span<float> gradient_shard(int bucket);
  std::span<const float> gradient_shard(int bucket) const {
    return const_cast<Storage*>(this)->gradient_shard(bucket);
  }
  /// Where reductions leave a trainable bucket's sums: the gradient shard, or its stage.
  std::span<float> sums(int bucket);
  /// For sums over replicas: all of them and their padding, and this rank's part.
  comm::SymmetricSpan sums_source(int bucket);
  comm::SymmetricSpan outer_source(int bucket);
  /// Gives gradient shards memory of their own where sums outlive a micro-batch: to be called
  /// before a step of several micro-batches, or by those who keep a gradient shard's address.
  void keep_sums_apart();

  /// Where the whole bucket lies when it is in use: in its unit's slot, or where the shards are.
  std::byte* gathered(int bucket);
  /// Where the bucket's gradient of one micro-batch is collected, in the bucket's reduce_dtype.
  std::byte* gradient(int bucket);
  comm::SymmetricSpan gradient_source(int bucket);
  /// The whole slot, for poisoning.
  std::span<std::byte> slot(int slot);
  /// Whether `address` lies in memory of gathered parameters.
  bool contains(const void* address) const;

  /// Writes / reads fp32 values (host memory) at element `at` of this rank's part; exact for
  /// trainable buckets of any dtype that has a master. Throws InternalError outside of the part.
  void store(int bucket, int64_t at, std::span<const float> values);
  void load(int bucket, int64_t at, std::span<float> values) const;

  /// Of where the rank computes, and of the host where state is offloaded.
  int64_t allocated_bytes() const { return allocated_bytes_; }
  int64_t offloaded_bytes() const { return offloaded_bytes_; }
  /// Slots, gradient slots, stages.
  int64_t transient_bytes() const;

 private:
  struct Place {
    int64_t shard_offset = 0;  // In symmetric memory; in the shared home the whole bucket's, in
                               // shared memory.
    int64_t in_slot = 0;       // From the slot's begin.
    int64_t in_gradient_slot = 0;
    int64_t in_stage = 0;
    int64_t in_gradient_stage = 0;
    int64_t in_outer_slot = 0;
    int64_t sums_offset = 0;  // In symmetric memory, when it is there.
    std::span<float> gradient;
    uint16_t* remainder = nullptr;
    float* master = nullptr;
  };
  bool shared() const { return placement_.home == plan::Home::kShared; }
  bool offloads() const { return placement_.offloads(); }
  bool two_level() const { return placement_.reduction == plan::Reduction::kTwoLevel; }
  void place_buckets();
  void allocate(comm::Communicator& comm, MasterPrecision precision);
  void allocate_shards(comm::Communicator& comm);
  void allocate_transients(comm::Communicator& comm);
  int64_t home_bytes(MasterPrecision precision) const;
  void place_at_home(std::byte* memory, int64_t bytes, MasterPrecision precision);
  bool sums_at_home(int bucket) const;
  bool sums_in_slot(int bucket) const;
  std::byte* gradient_slot(int slot);

  plan::Layout layout_;
  plan::Placement placement_;
  plan::SlotMap slots_;
  int coordinate_ = 0;  // Of this rank, in its shard group.
  std::vector<Place> places_;
  int64_t shard_bytes_ = 0;              // Of all buckets; in the shared home of whole buckets.
  std::vector<int64_t> slot_begin_;      // By slot, and the end.
  std::vector<int64_t> gradient_begin_;  // By gradient slot, and the end.
  std::vector<int64_t> stage_begin_;     // Likewise.
  std::vector<int64_t> gradient_stage_begin_;  // Likewise.
  int64_t sums_bytes_ = 0;                     // In symmetric memory.
  int64_t allocated_bytes_ = 0;
  int64_t offloaded_bytes_ = 0;
  std::shared_ptr<comm::SymmetricMemory> shards_;      // Null in the shared home.
  std::shared_ptr<comm::SharedMemory> shared_shards_;  // Null in the others.
  std::shared_ptr<comm::SymmetricMemory> gradients_;
  std::shared_ptr<comm::SymmetricMemory> stages_;           // Null where nothing is offloaded.
  std::shared_ptr<comm::SymmetricMemory> gradient_stages_;  // Likewise.
  std::shared_ptr<comm::SymmetricMemory> sums_memory_;      // Where replicas read sums in place.
  std::shared_ptr<comm::SymmetricMemory> outer_;            // Null with one level of reduction.
  kernels::Compute* compute_;
  kernels::Compute* home_;
  std::unique_ptr<kernels::CopyStream> copies_;
  kernels::ComputeMemory home_memory_;  // Masters and sums; shards too when they are offloaded.
  std::byte* offloaded_shards_ = nullptr;
  kernels::ComputeMemory local_slots_;  // On the host; null on devices.
  bool sums_apart_ = false;
  kernels::ComputeMemory apart_;                         // Of keep_sums_apart().
  std::shared_ptr<comm::SymmetricMemory> slots_memory_;  // On devices; null on the host.
  std::byte* slot_memory_ = nullptr;
};

}  // namespace fsdp::engine
