// A rank of a large world without its peers: what plans, memory and the engine's own time come to
// at sizes that nobody starts for a test.
#pragma once

#include <array>
#include <memory>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/os/mapping.h"

namespace fsdp::comm {

struct FakeOptions {
  bool can_share = false;  ///< All ranks are taken for ranks of one host.
  /// Gathers write this rank's data in every member's place; otherwise they leave the destination
  /// alone.
  bool repeat_own_data = true;
};

/// What a rank has done so far.
struct FakeCount {
  int64_t collectives = 0;
  int64_t bytes = 0;  ///< That it would have received from its peers.
};

/// Rank r of a world of up to 4096, of which no other rank exists.
///
/// A collective is complete when it has begun: data moves in begin. A gather repeats this rank's
/// data, a fold and an exchange take this rank's contribution for everybody's, a broadcast leaves
/// the data alone. In a world of one rank that is what every transport does. allocate gives memory
/// of this rank only; peer(r) is that memory for every r.
class FakeCommunicator final : public Communicator {
 public:
  FakeCommunicator(int rank, int size, const FakeOptions& options);
  ~FakeCommunicator() override;

  /// Since the start or the last reset_counts().
  const FakeCount& count(CollectiveKind kind) const;
  FakeCount total() const;
  void reset_counts() { counts_ = {}; }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::shared_ptr<SymmetricMemory> allocate(size_t bytes, std::string_view label) override;
  bool can_share(const Group&) const override { return options_.can_share; }
  std::shared_ptr<SharedMemory> allocate_shared(const Group& group, size_t bytes,
                                                std::string_view label) override;
  Ticket begin_gather(const Group& group, SymmetricSpan source, std::byte* destination,
                      Tag tag) override;
  Ticket begin_fold(const Group& group, SymmetricSpan source, DType dtype, int64_t begin,
                    std::span<float> destination, bool accumulate, Tag tag) override;
  Ticket begin_fence(const Group& group, Tag tag) override;
  void finish(Ticket ticket) override;
  void wait_released(Ticket ticket) override { finish(ticket); }
  void exchange(const void* mine, size_t bytes, void* all, Tag tag) override;
  void broadcast(void* data, size_t bytes, int root, Tag tag) override;
  void barrier(Tag tag) override;
  void abort(std::string_view reason) noexcept override;
  void report_progress(int64_t, std::string_view) override {}

 private:
  struct AbortReason;
  Ticket begin(CollectiveKind kind, const Group& group, size_t bytes_from_each_peer);
  std::shared_ptr<Mapping> new_memory(CollectiveKind kind, size_t bytes, std::string_view label);
  void throw_if_aborted() const;

  int rank_;
  int size_;
  FakeOptions options_;
  std::array<FakeCount, kNumCollectiveKinds> counts_{};
  uint64_t begun_ = 0;
  std::unique_ptr<AbortReason> abort_reason_;
};

/// Throws InternalError unless 0 <= rank < size <= 4096.
std::unique_ptr<FakeCommunicator> make_fake(int rank, int size, const FakeOptions& options = {});

}  // namespace fsdp::comm
