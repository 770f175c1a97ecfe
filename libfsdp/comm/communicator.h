// How ranks exchange data. One interface; transports: one rank, threads of one process, processes
// of one host (shm).
//
// Data moves between *symmetric memory*: blocks that every rank allocates together, with the same
// size, so that an offset means the same thing on each rank and a peer can read it without a copy
// in between. A collective has three moments, and the caller chooses when each happens:
//   begin     this rank's source may be read by its peers from now on (does not wait);
//   finish    this rank's destination is complete (waits until all members have begun);
//   released  every member has read this rank's source: it may be overwritten.
// Data moves in the receiver's finish, pulled from the peers' memory by the calling thread.
// Note [One order] Every rank begins the same collectives in the same order; where groups are used,
// each rank takes part in some group at that place of the program. Each carries a Tag; tags are
// compared when a collective finishes, before its data is used, and a difference is a CommError
// that names both sides.
//
// Where the members of a group are on one host they can also hold memory *once*: all map the same
// bytes, each writes its own part, and a gather is a fence: a collective without data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/base/dtype.h"

namespace fsdp::kernels {
class Compute;
}

namespace fsdp::comm {

enum class CollectiveKind : uint8_t {
  kGather,
  kFold,
  kExchange,
  kBroadcast,
  kBarrier,
  kAllocate,
  kFence,
  kAllocateShared,
};
inline constexpr int kNumCollectiveKinds = 8;

/// What a collective is about, as seen by one rank; equal on all members of a collective.
struct Tag {
  CollectiveKind kind = CollectiveKind::kBarrier;  ///< Filled in by the communicator.
  DType dtype = DType::kU8;                        ///< Filled in by the communicator.
  int32_t unit = -1;                               ///< Unit index of the plan, -1 = none.
  int64_t step = -1;                               ///< Optimizer step, -1 = none.
  int64_t bytes = 0;                               ///< Filled in by the communicator.
  char what[24] = {};  ///< Short name for people: "gather", "loss packet", ...

  bool operator==(const Tag&) const = default;
};

/// Makes a tag; `what` is cut at 23 characters.
Tag make_tag(std::string_view what, int64_t step = -1, int32_t unit = -1);
/// "gather of unit 3 at step 7 (bfloat16, 4096 bytes)"; with the unit's name where it is known.
std::string describe(const Tag& tag, std::string_view unit_name = {});
/// "gather of unit 3", "step packet": for lines that say the step elsewhere.
std::string describe_briefly(const Tag& tag, std::string_view unit_name = {});
/// "unit 'layers.3'", or "unit 3" without a name.
std::string unit_text(int32_t unit, std::string_view name);

/// A block of equal size on every rank. Lives until the last handle of every rank is gone.
class SymmetricMemory {
 public:
  virtual ~SymmetricMemory() = default;
  virtual size_t bytes() const = 0;
  /// This rank's block, 4096-byte aligned, zero at first. All pages are present: the first touch
  /// costs nothing extra.
  virtual std::byte* local() = 0;
  /// The block of `rank` as this rank may read it, between a collective's begin and finish only;
  /// nullptr where the ranks' memory is not mapped here.
  virtual const std::byte* peer(int rank) const = 0;
};

/// A block that the members of a group hold once: what one writes, all see after the next fence.
/// Lives until the last handle of every member is gone.
class SharedMemory {
 public:
  virtual ~SharedMemory() = default;
  virtual size_t bytes() const = 0;
  /// The one block, writable, 4096-byte aligned, zero at first. All pages are present.
  virtual std::byte* data() = 0;
};

/// A range of this rank's block.
struct SymmetricSpan {
  SymmetricMemory* memory = nullptr;
  size_t offset = 0;
  size_t bytes = 0;
};

/// The members of a collective, as ranks of the communicator, ascending. Groups that are used at
/// the same point of the program must not overlap.
using Group = std::vector<int>;

/// Identifies a begun collective on this rank.
struct Ticket {
  uint64_t sequence = 0;  ///< 0 = none: finish and wait_released return at once.
};

/// One rank's end of a world. Used by one thread at a time.
///
/// A collective's destination belongs to it from begin to finish: some transports write it in
/// between.
/// Up to 64 collectives may be under way; the 65th begin first finishes the oldest and waits for
/// its release. Collectives do not touch the heap.
///
/// Every wait ends in CommError when a member dies, aborts, or stays away longer than the time-out;
/// the text names the missing rank, the collective that is waited for and what the others are
/// doing. After any CommError the communicator is unusable: all later calls throw too.
class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// Ranks of each host, which are neighbours; of this world's hosts all have as many.
  virtual int ranks_per_host() const { return size(); }
  /// All ranks, ascending.
  const Group& world() const { return world_; }
  /// Where the memory of this communicator and its users lies: the host's, or that of a device.
  /// Then collectives are ordered with what is enqueued there: finish and wait_released make its
  /// stream wait, not the caller, and begin lets peers read what was enqueued before it. What
  /// exchange, broadcast and the like move is host memory everywhere.
  virtual kernels::Compute& compute();

  /// Collective over the world: a block of `bytes` (may be 0) on every rank.
  virtual std::shared_ptr<SymmetricMemory> allocate(size_t bytes, std::string_view label) = 0;

  /// Whether the members of `group` can hold memory once (allocate_shared). Not collective; equal
  /// on all members.
  virtual bool can_share(const Group& group) const = 0;

  /// Collective over the world: one block of `bytes` (may be 0) for each group.
  ///
  /// The groups that the ranks give partition the world; `bytes` and `label` are equal on all
  /// ranks. Throws HostResourceError on every rank alike when one group's first member has no room;
  /// InternalError unless can_share(group).
  virtual std::shared_ptr<SharedMemory> allocate_shared(const Group& group, size_t bytes,
                                                        std::string_view label) = 0;

  /// destination = the members' sources end to end, in group order.
  ///
  /// Collective over `group`, which contains this rank. All members give equal `source.bytes` and
  /// equal offsets; `destination` has group.size() * source.bytes bytes, valid after finish. Cost:
  /// one copy of those bytes.
  virtual Ticket begin_gather(const Group& group, SymmetricSpan source, std::byte* destination,
                              Tag tag) = 0;

  /// destination[i] (+)= ((s_0[begin + i] + s_1[begin + i]) + ...) in fp32, members' sources in
  /// group order.
  ///
  /// Collective over `group`. `source` holds elements of `dtype` (f32, bf16, f16), the same number
  /// on all members; `begin` (elements) and destination.size() choose this rank's part and may
  /// differ between members (0 is legal). With accumulate the old value is the leftmost operand of
  /// the fold: ((d + s_0) + s_1) + ...; without, s_0 is, and `destination` may be this rank's part
  /// of its own source (f32, when the parts of the members do not overlap).
  virtual Ticket begin_fold(const Group& group, SymmetricSpan source, DType dtype, int64_t begin,
                            std::span<float> destination, bool accumulate, Tag tag) = 0;

  /// Lets folds add in another order, and in the source's type, where that is faster (nccl); sums
  /// then may differ in their last bits between numbers of ranks. Off at first. Equal on all ranks.
  virtual void allow_any_order(bool /*allowed*/) {}

  /// Collective over `group`, without data: finish returns when all members have begun, and what
  /// they wrote before that to shared memory is visible then. wait_released returns when all have
  /// finished: all have seen what this rank waited for. Cost: about 1 us for two ranks that come
  /// together.
  virtual Ticket begin_fence(const Group& group, Tag tag) = 0;

  /// Waits until the collective's destination is complete. Idempotent. Tickets finish in the order
  /// they began: finishing one finishes all earlier ones.
  virtual void finish(Ticket ticket) = 0;
  /// Finishes, then waits until every member has finished: the source may be overwritten.
  virtual void wait_released(Ticket ticket) = 0;

  /// all[r * bytes .. ] = rank r's `mine`, for small host structures. Collective over the world;
  /// blocks.
  virtual void exchange(const void* mine, size_t bytes, void* all, Tag tag) = 0;
  /// data of `root` on every rank (any size). Collective over the world; blocks.
  virtual void broadcast(void* data, size_t bytes, int root, Tag tag) = 0;
  /// Collective over the world; blocks.
  virtual void barrier(Tag tag) = 0;

  /// Makes every pending and later wait of all members throw CommError with `reason`. Not
  /// collective; any thread.
  virtual void abort(std::string_view reason) noexcept = 0;

  /// Why nothing more can come of this world, as far as is known without a collective: a rank has
  /// failed, is gone, has left, or shows no sign of life. Empty = nothing is known. Not collective;
  /// does not wait; any thread, one at a time.
  virtual std::string failure() { return {}; }

  /// Says what this rank is doing, so that others and the launcher can name it when it fails. Not
  /// collective; three plain stores. `phase` is cut at 16 characters; step -1 = none.
  virtual void report_progress(int64_t step, std::string_view phase) = 0;
  /// Says which unit this rank computes, -1 = none. Not collective; one plain store.
  virtual void report_unit(int32_t /*unit*/) {}
  /// Names of the plan's units by index, equal on all ranks, for the same purpose. Not collective;
  /// once a model. Long names keep their end.
  virtual void name_units(std::span<const std::string> /*names*/) {}

  /// Sums, or takes the maximum of, one integer over the world. Collective; blocks.
  int64_t sum(int64_t value, std::string_view what);
  int64_t maximum(int64_t value, std::string_view what);

 protected:
  Group world_;

 private:
  template <class Use>
  void for_each_value(int64_t value, std::string_view what, Use use);
};

}  // namespace fsdp::comm
