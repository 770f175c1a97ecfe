// What has gone wrong among the ranks, and the wait that is to hear of it.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/gloo/mesh.h"

namespace fsdp::gloo {

/// Thread safety: all of it; one thread at a time is in wait().
class PeerFailures {
 public:
  /// A wait under way.
  struct Wait {
    int member = -1;
    uint64_t sequence = 0;  ///< Of the collective.
    comm::Tag what;
    double waited_s = 0;
  };

  explicit PeerFailures(int size);

  /// The world is of no more use; the first text is the one that is told.
  void fail(const std::string& text);
  bool failed();
  /// Throws CommError with fail()'s text.
  void throw_if_failed();

  /// Nothing will come from `rank` any more; the first reason holds.
  void note_lost(int rank, const std::string& why);
  /// `rank` has begun `begun` collectives and will begin no more.
  void note_left(int rank, uint64_t begun);
  /// Whether nothing will come from `rank` for a collective.
  bool is_hopeless(int rank, uint64_t sequence);
  /// Everything that went wrong first: fail()'s text, or "rank 1 has left: ..."; empty = nothing.
  std::string known();
  /// Why nothing will come from `rank`, as the end of a sentence about it.
  std::string why_lost(int rank);

  /// transfer.wait(), which ends with false when it becomes hopeless.
  bool wait(Transfer& transfer, int member, uint64_t sequence, const comm::Tag& what);
  /// The wait under way. To be called about 20 times a second: that is its clock.
  std::optional<Wait> look();

 private:
  bool hopeless(int rank, uint64_t sequence) const {
    const auto at = static_cast<size_t>(rank);
    return !failed_.empty() || !lost_[at].empty() || left_at_[at] < sequence;
  }
  std::string reason(size_t rank) const {
    return lost_[rank].empty() ? "has left: its part of the program has ended" : lost_[rank];
  }
  void wake_if_hopeless() {
    if (waiting_ != nullptr && hopeless(wait_.member, wait_.sequence)) waiting_->abort();
  }

  std::mutex mutex_;
  std::string failed_;
  std::vector<std::string> lost_;  // By rank.
  std::vector<uint64_t> left_at_;  // Collectives that a rank has begun before it left.
  Transfer* waiting_ = nullptr;
  Wait wait_;
  double looked_ = 0;
};

}  // namespace fsdp::gloo
