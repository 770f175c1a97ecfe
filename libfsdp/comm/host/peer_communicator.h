// What the transports within one host share: the order of collectives, waiting, comparing tags,
// moving the data. A transport adds how memory is made visible to the peers and how a lost peer is
// noticed.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/control/control.h"
#include "libfsdp/comm/options.h"
#include "libfsdp/comm/os/mapping.h"

namespace fsdp::comm {

/// The blocks of one allocation, as one rank maps them.
class SharedBlock final : public SymmetricMemory, public std::enable_shared_from_this<SharedBlock> {
 public:
  SharedBlock(uint32_t id, int rank, int size, size_t bytes)
      : parts(size), id_(id), rank_(rank), bytes_(bytes) {}
  size_t bytes() const override { return bytes_; }
  std::byte* local() override { return parts[rank_]->data(); }
  const std::byte* peer(int rank) const override { return parts[rank]->data(); }
  uint32_t id() const { return id_; }

  std::vector<std::shared_ptr<Mapping>> parts;

 private:
  uint32_t id_;
  int rank_;
  size_t bytes_;
};

/// A block that a group holds once, as one member maps it.
class BlockHeldOnce final : public SharedMemory {
 public:
  BlockHeldOnce(std::shared_ptr<Mapping> mapping, size_t bytes)
      : mapping_(std::move(mapping)), bytes_(bytes) {}
  size_t bytes() const override { return bytes_; }
  std::byte* data() override { return mapping_->data(); }

 private:
  std::shared_ptr<Mapping> mapping_;
  size_t bytes_;
};

/// Note [Sequence numbers] Every collective of a world has a number, the same on all ranks, also
/// when different groups run at the same place of the program. A rank publishes two counters, begun
/// and finished, and for each number that is under way what it has posted. finish waits for the
/// members' begun, wait_released for the members' finished. A place in the ring of posted
/// collectives is used again only after all members have finished its last use.
class PeerCommunicator : public Communicator {
 public:
  ~PeerCommunicator() override;
  int rank() const override { return rank_; }
  int size() const override { return size_; }

  std::shared_ptr<SymmetricMemory> allocate(size_t bytes, std::string_view label) override;
  /// Ranks of one host can always share.
  bool can_share(const Group&) const override { return true; }
  std::shared_ptr<SharedMemory> allocate_shared(const Group& group, size_t bytes,
                                                std::string_view label) override;
  Ticket begin_gather(const Group& group, SymmetricSpan source, std::byte* destination,
                      Tag tag) override;
  Ticket begin_fold(const Group& group, SymmetricSpan source, DType dtype, int64_t begin,
                    std::span<float> destination, bool accumulate, Tag tag) override;
  Ticket begin_fence(const Group& group, Tag tag) override;
  void finish(Ticket ticket) override;
  void wait_released(Ticket ticket) override;
  void exchange(const void* mine, size_t bytes, void* all, Tag tag) override;
  void broadcast(void* data, size_t bytes, int root, Tag tag) override;
  void barrier(Tag tag) override;
  void abort(std::string_view reason) noexcept override;
  std::string failure() override;
  void report_progress(int64_t step, std::string_view phase) override;
  void report_unit(int32_t unit) override;
  void name_units(std::span<const std::string> names) override;

 protected:
  /// `keeper` owns the control block's memory.
  PeerCommunicator(std::shared_ptr<Mapping> keeper, ControlView control, int rank,
                   const CommOptions& options);

  /// Makes memory of this rank for allocation `id`, which `users` will attach; throws
  /// HostResourceError.
  virtual std::shared_ptr<Mapping> create_part(uint32_t id, const Group& users, size_t bytes,
                                               std::string_view label) = 0;
  /// The memory that `owner` made for allocation `id`; throws HostResourceError.
  virtual std::shared_ptr<Mapping> attach_part(uint32_t id, int owner, size_t bytes,
                                               bool writable) = 0;
  /// Called when all ranks have attached, or when the allocation has failed on all.
  virtual void parts_settled(uint32_t /*id*/) {}
  /// Why nothing will ever come from `rank` again, or empty. Called about ten times a second while
  /// waiting for it.
  virtual std::string why_lost(int rank) = 0;
  virtual bool peers_have_heartbeats() const { return false; }

  /// Tells the peers that nothing will come from this rank any more. Idempotent.
  void leave();
  /// Throws CommError for good reason, and tells all others. `lost`: the rank that was missed.
  [[noreturn]] void fail(const std::string& text, int lost = -1);
  /// Throws CommError if somebody has aborted.
  void throw_if_aborted() const;

  const ControlView& control() const { return control_; }
  const CommOptions& options() const { return options_; }

 private:
  struct Pending;
  struct Watch;

  Pending& post(CollectiveKind kind, DType dtype, const Group& group, uint64_t offset,
                uint32_t memory, int64_t bytes, Tag tag);
  void publish(Pending& pending);
  void finish_next();
  void compare(const Pending& pending, int member);
  void move_data(Pending& pending);
  void gather(const Pending& pending);
  void fold(const Pending& pending);
  /// Waits until `signal` of `member` reaches `target`; `what` is what the caller is doing, for the
  /// error text.
  void wait_for(Signal& signal, uint64_t target, int member, const Tag& what);
  void sleep_until(Signal& signal, uint64_t target, int member, const Tag& what);
  void look_after(Watch& watch, Signal& signal, uint64_t target);
  void look_for_life(const Watch& watch);
  std::string why_absent(int member, double slice_s);
  [[noreturn]] void fail_waiting(int member, const Tag& what, const std::string& why);
  std::string named(const Tag& tag) const;
  int next_staging_half();
  void run_exchange(CollectiveKind kind, const void* mine, size_t bytes, void* all,
                    int64_t tag_bytes, Tag tag);
  template <class Work>
  void do_and_agree(CollectiveKind kind, const Group& group, size_t bytes, std::string_view label,
                    Work work);
  void agree_on_memory(CollectiveKind kind, const std::string& error, const Group& group,
                       size_t bytes, std::string_view label);

  std::shared_ptr<Mapping> keeper_;
  ControlView control_;
  int rank_;
  int size_;
  CommOptions options_;
  bool spins_;
  uint64_t begun_ = 0;
  uint64_t finished_ = 0;
  uint32_t allocations_ = 0;
  uint64_t staging_uses_ = 0;
  std::unique_ptr<std::array<Pending, kRing>> pending_;

  struct Pulse {
    uint64_t heartbeat = 0;
    double still_s = 0;
  };
  std::vector<Pulse> pulses_;  // By rank, as failure() saw them.
  double last_failure_look_ = 0;
};

}  // namespace fsdp::comm
