// The memory through which ranks see what their peers have begun and finished. Plain data; the same
// bytes serve threads of one process and processes of one host.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/os/futex.h"

namespace fsdp::comm {

inline constexpr int kMaxRanks = 128;  ///< Of one host.
inline constexpr uint64_t kRing =
    64;  ///< Collectives that a rank may have begun ahead of its peers.
inline constexpr size_t kStagingBytes =
    256 << 10;  ///< One of the two halves in which small data is handed over.
inline constexpr size_t kMaxUnitNames = 1024;  ///< Units beyond that are known by their number.
inline constexpr size_t kUnitNameBytes = 48;   ///< With the NUL at the end.

/// What a rank says about a collective that it has begun.
struct Posted {
  uint64_t sequence = 0;
  uint64_t group = 0;   ///< Bit mask of the members up to rank 63, beyond that a hash.
  uint64_t offset = 0;  ///< Of the source; for a broadcast the root.
  uint32_t memory = 0;  ///< Number of the allocation, 0 = staging.
  Tag tag;
};

enum class Presence : uint32_t { kAbsent, kJoined, kLeft };

/// Whom a rank sleeps for. It stays as it is when the wait ends in an error, so that it can be read
/// after the fact.
struct Waiting {
  std::atomic<int32_t> member{0};     ///< Rank + 1; 0 = it does not wait.
  std::atomic<uint64_t> sequence{0};  ///< The collective's place in the waiter's own ring.
  std::atomic<int64_t> since_ns{0};   ///< Of the monotonic clock, which all processes share.
};

/// Written by its rank only, read by all.
struct RankControl {
  Signal begun;     ///< Sequence number of the last collective begun.
  Signal finished;  ///< ... finished: this rank has read its peers' sources.
  alignas(64) std::atomic<Presence> presence{Presence::kAbsent};
  std::atomic<uint64_t> heartbeat{0};
  std::atomic<int64_t> step{-1};
  std::atomic<uint64_t> phase[2]{};
  std::atomic<int32_t> unit{-1};
  Waiting waiting;
  alignas(64) Posted ring[kRing];
};

struct WorldControl {
  uint64_t magic = 0;
  int32_t size = 0;
  std::atomic<uint32_t> abort_state{0};  ///< 0 none, 1 text is being written, 2 text is there.
  int32_t abort_rank = -1;
  int32_t abort_lost = -1;  ///< The rank that the aborting one missed, -1 = none.
  char abort_text[4000] = {};
  std::atomic<int32_t> num_unit_names{0};  ///< -1: two models named their units differently.
  char unit_names[kMaxUnitNames][kUnitNameBytes] = {};
};

/// Nanoseconds of the clock that all processes of a host share.
int64_t monotonic_ns();

/// Finds its way in a control block; does not own it.
class ControlView {
 public:
  ControlView() = default;
  /// Bytes of the block of a world.
  static size_t bytes(int size);
  /// Makes a new block in zeroed memory.
  static ControlView create(std::byte* data, int size);
  /// Looks at a block that `create` made. Throws CommError if it is none, or one of another build.
  static ControlView open(std::byte* data, size_t bytes);

  int size() const { return world().size; }
  WorldControl& world() const { return *reinterpret_cast<WorldControl*>(data_); }
  RankControl& rank(int rank) const;
  std::byte* staging(int rank, int half) const;

  /// Stores the reason unless there is one already, and wakes everybody. `lost` is the rank whose
  /// absence is the reason, -1 = none.
  void abort(int rank, std::string_view text, int lost = -1) const noexcept;
  bool aborted() const { return world().abort_state.load(std::memory_order_acquire) != 0; }
  /// "rank 1 failed: text", or empty.
  std::string abort_text() const;
  /// The rank that was missed, or -1.
  int abort_lost() const;
  /// The rank that aborted, or -1.
  int abort_rank() const;

  /// What a rank is doing, for people. Cheap: three relaxed stores.
  void set_progress(int rank, int64_t step, std::string_view phase) const;
  /// "step 7, phase backward"; parts that are not known are left out.
  std::string progress(int rank) const;
  void set_unit(int rank, int32_t unit) const {
    this->rank(rank).unit.store(unit, std::memory_order_relaxed);
  }

  /// Says that `rank` sleeps for `member` in the collective `sequence` of its own ring.
  void set_waiting(int rank, int member, uint64_t sequence) const;
  void set_not_waiting(int rank) const {
    this->rank(rank).waiting.member.store(0, std::memory_order_release);
  }

  /// Unit names by index, cut to their last 47 characters; one rank of the world calls it. Names
  /// that differ from those of an earlier call drop them all: two models share the world.
  void name_units(std::span<const std::string> names) const;
  /// Empty when it is not known.
  std::string_view unit_name(int32_t unit) const;

 private:
  explicit ControlView(std::byte* data) : data_(data) {}
  std::byte* data_ = nullptr;
};

}  // namespace fsdp::comm
