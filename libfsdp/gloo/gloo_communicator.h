// A Communicator whose ranks may be on several hosts.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/control/control_channel.h"
#include "libfsdp/comm/control/control_hub.h"
#include "libfsdp/gloo/mesh.h"
#include "libfsdp/gloo/peer_failures.h"

namespace fsdp::gloo {

/// Note [Tags first] begin sends each member a message with the collective's tag, and small data.
/// Only after every member's message has come and agreed does data move, straight from the source
/// to the destination, so that a rank that skips, repeats, reorders, resizes or retypes a
/// collective is caught before. Messages between two ranks come in order, whatever they are about.
///
/// Note [Who moves data] Collectives are driven in the order they began, by one thread at a time:
/// whoever waits in finish, or a thread of this object while the rank computes. A fold's parts go
/// to their owners, who add them in rank order: the bits are those of the other transports.
///
/// Note [Released] A send that is done has left the source. finish therefore means released, too.
///
/// Failures come from the control channel (lost, left, aborted) or from the connections; either
/// way the wait that is under way is aborted, and this rank's CommError names whom it waited for.
/// Unlike within one host, collectives touch the heap.
class GlooCommunicator final : public comm::Communicator {
 public:
  struct Place {
    int rank = 0;
    int size = 1;
    int local_rank = 0;
    int local_size = 1;
    std::string host;  ///< Of the hub.
    int port = 0;
    std::string token;
    double join_timeout_s = 60;
  };
  /// `hub` only on rank 0. `local`, if any, is the world of the launcher of one host: it is told of
  /// progress and failure, too.
  GlooCommunicator(const Place& place, const comm::CommOptions& options,
                   std::unique_ptr<comm::ControlHub> hub,
                   std::unique_ptr<comm::Communicator> local);
  ~GlooCommunicator() override;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  /// 1 where hosts have unequal numbers of ranks, or ranks that are no neighbours.
  int ranks_per_host() const override { return ranks_per_host_; }
  std::shared_ptr<comm::SymmetricMemory> allocate(size_t bytes, std::string_view label) override;
  bool can_share(const comm::Group&) const override { return false; }
  std::shared_ptr<comm::SharedMemory> allocate_shared(const comm::Group& group, size_t bytes,
                                                      std::string_view label) override;
  comm::Ticket begin_gather(const comm::Group& group, comm::SymmetricSpan source,
                            std::byte* destination, comm::Tag tag) override;
  comm::Ticket begin_fold(const comm::Group& group, comm::SymmetricSpan source, DType dtype,
                          int64_t begin, std::span<float> destination, bool accumulate,
                          comm::Tag tag) override;
  comm::Ticket begin_fence(const comm::Group& group, comm::Tag tag) override;
  void finish(comm::Ticket ticket) override;
  void wait_released(comm::Ticket ticket) override { finish(ticket); }
  void exchange(const void* mine, size_t bytes, void* all, comm::Tag tag) override;
  void broadcast(void* data, size_t bytes, int root, comm::Tag tag) override;
  void barrier(comm::Tag tag) override;
  void abort(std::string_view reason) noexcept override;
  std::string failure() override { return failures_.known(); }
  void report_progress(int64_t step, std::string_view phase) override;
  void report_unit(int32_t unit) override;
  void name_units(std::span<const std::string> names) override;

 private:
  struct Message;
  struct Pending;
  struct Inbox;
  using Transfers = std::vector<std::unique_ptr<Transfer>>;

  void connect(const Place& place);
  int agree_on_hosts(const Place& place);
  void close();

  // Beginning.
  Pending& post(comm::CollectiveKind kind, DType dtype, const comm::Group& group, uint64_t offset,
                uint32_t memory, int64_t bytes, comm::Tag tag);
  comm::Ticket publish(Pending& pending, bool wake_driver);
  void exchange_as(comm::CollectiveKind kind, const void* mine, size_t bytes, void* all,
                   int64_t tag_bytes, comm::Tag tag);

  // Driving; whoever does holds driving_.
  void drive_in_background();
  void drive_until(uint64_t sequence);
  void drive_next();
  void receive_messages(Pending& pending);
  void post_receive(int peer);
  void compare(const Pending& pending, int member, const Message& theirs);
  void move_data(Pending& pending);
  void gather(Pending& pending);
  void fold(Pending& pending);
  void broadcast_from_root(Pending& pending);
  void send(Pending& pending, int member, const std::byte* data, size_t bytes);
  void wait_all(Transfers& transfers, const std::vector<int>& members, const Pending& pending);
  void wait(Transfer& transfer, int member, const Pending& pending);
  /// Gives the reason of a broken connection some time to come.
  void wait_for_word(int member, const std::string& broken, const Pending& pending);
  std::unique_ptr<Transfer> start_send(int member, int channel, const void* data, size_t bytes,
                                       const Pending& pending);
  std::unique_ptr<Transfer> start_receive(int member, void* data, size_t bytes,
                                          const Pending& pending);

  // Failing.
  comm::ControlEvents events();
  void look_at_clock();
  [[noreturn]] void fail_waiting(int member, const comm::Tag& what);
  [[noreturn]] void fail(const std::string& text);
  std::string named(const comm::Tag& tag);

  int rank_;
  int size_;
  int ranks_per_host_ = 1;
  comm::CommOptions options_;
  std::unique_ptr<comm::Communicator> local_;
  PeerFailures failures_;
  std::unique_ptr<comm::ControlHub> hub_;
  std::unique_ptr<comm::ControlChannel> control_;
  std::unique_ptr<std::array<Pending, 64>> pending_;
  std::vector<std::unique_ptr<Inbox>> inboxes_;  // One for each peer.
  std::unique_ptr<Mesh> mesh_;
  comm::SignOfLife state_;  // Of the calling thread.
  std::vector<std::string> unit_names_;
  uint64_t begun_ = 0;  // Of the calling thread.
  uint32_t allocations_ = 0;
  std::vector<std::byte> parts_;  // Of a fold; of who drives.
  std::mutex driving_;
  std::atomic<uint64_t> finished_{0};
  std::mutex wake_mutex_;
  std::condition_variable wake_;
  uint64_t wanted_ = 0;  // Of wake_mutex_: drive up to here.
  bool stop_ = false;    // Of wake_mutex_.
  std::thread driver_;
};

}  // namespace fsdp::gloo
