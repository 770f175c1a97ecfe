#include "libfsdp/comm/host/shm_world.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <csignal>
#include <cstring>
#include <mutex>
#include <thread>
#include <tuple>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/host/peer_communicator.h"

namespace fsdp::comm {
namespace {

constexpr uint32_t kPartsMagic = 0x70617274;

struct PartsHeader {
  uint32_t magic = kPartsMagic;
  int32_t rank = 0;
  int32_t size = 0;
};

struct BlockHeader {
  uint32_t id = 0;
  uint64_t bytes = 0;
};

template <class T>
std::string_view bytes_of(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}

// A world has size * size sockets for a moment; the usual limit of 1024 open files would end at 32
// ranks.
class MoreOpenFiles {
 public:
  explicit MoreOpenFiles(rlim_t needed) {
    getrlimit(RLIMIT_NOFILE, &before_);
    rlimit raised = before_;
    raised.rlim_cur = std::max(before_.rlim_cur, std::min(before_.rlim_max, needed));
    setrlimit(RLIMIT_NOFILE, &raised);
  }
  ~MoreOpenFiles() { setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_{};
};

/// Shows that this process still runs, also while its rank computes.
class Heartbeat {
 public:
  explicit Heartbeat(RankControl& control) {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // Signals are for the program's own threads.
    thread_ = std::thread([this, &control] { run(control); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
  ~Heartbeat() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    stopped_.notify_all();
    thread_.join();
  }

 private:
  void run(RankControl& control) {
    std::unique_lock lock(mutex_);
    do {
      control.heartbeat.fetch_add(1, std::memory_order_relaxed);
    } while (!stopped_.wait_for(lock, std::chrono::milliseconds(250), [this] { return stop_; }));
  }

  std::mutex mutex_;
  std::condition_variable stopped_;
  bool stop_ = false;
  std::thread thread_;
};

class ShmCommunicator final : public PeerCommunicator {
 public:
  ShmCommunicator(RankParts parts, const std::shared_ptr<Mapping>& memory,
                  const CommOptions& options)
      : PeerCommunicator(memory, ControlView::open(memory->data(), memory->bytes()), parts.rank,
                         options),
        links_(std::move(parts.links)),
        heartbeat_(control().rank(rank())) {}
  ~ShmCommunicator() override {
    leave();
  }  // Before the links close: a rank that leaves is not taken for dead.

 private:
  // See attach_part: descriptors are sent before the ranks agree, so that nobody waits for a
  // message.
  std::shared_ptr<Mapping> create_part(uint32_t id, const Group& users, size_t bytes,
                                       std::string_view label) override {
    const FileDescriptor file(make_memory_file(label, bytes));
    auto part = Mapping::of_file(file.get(), bytes, true);
    for (const int peer : users) {
      // A peer that is gone is noticed, with its reason, in the wait that follows.
      if (peer != rank())
        send_message(links_[peer].get(), bytes_of(BlockHeader{id, bytes}), {file.get()});
    }
    return part;
  }

  std::shared_ptr<Mapping> attach_part(uint32_t id, int owner, size_t bytes,
                                       bool writable) override {
    return Mapping::of_file(receive_block(owner, id, bytes).get(), bytes, writable);
  }

  FileDescriptor receive_block(int peer, uint32_t id, size_t bytes) {
    for (;;) {
      Message message = receive_message(links_[peer].get(), 0);
      BlockHeader header;
      if (message.bytes.size() != sizeof(header) || message.descriptors.size() != 1) {
        fail(cat("[comm] rank ", peer, " was to hand over its block ", id, " and did not"));
      }
      std::memcpy(&header, message.bytes.data(), sizeof(header));
      // Left over from an allocation that failed on another rank.
      if (header.id < id) continue;
      check(header.id == id && header.bytes == bytes, "a peer's block is not the one asked for");
      return std::move(message.descriptors[0]);
    }
  }

  std::string why_lost(int rank) override {
    return peer_closed(links_[rank].get()) ? "is gone: its process has ended" : "";
  }

  bool peers_have_heartbeats() const override { return true; }

  std::vector<FileDescriptor> links_;
  Heartbeat heartbeat_;
};

}  // namespace

std::vector<RankParts> make_shm_world(int size) {
  if (size < 1 || size > kMaxRanks) {
    throw ConfigError(
        cat("[comm] a world of ", size, " ranks on one host; expected 1 to ", kMaxRanks));
  }
  const MoreOpenFiles more(static_cast<rlim_t>(size) * size + 4 * size + 256);
  const size_t bytes = ControlView::bytes(size);
  const FileDescriptor control(make_memory_file("control", bytes));
  ControlView::create(Mapping::of_file(control.get(), bytes, true)->data(), size);
  std::vector<RankParts> all(size);
  for (int rank = 0; rank < size; ++rank) {
    all[rank].rank = rank;
    all[rank].size = size;
    all[rank].control = FileDescriptor(fcntl(control.get(), F_DUPFD_CLOEXEC, 0));
    if (!all[rank].control)
      throw HostResourceError(cat("[comm] cannot duplicate a descriptor: ", strerror(errno)));
    all[rank].links.resize(size);
  }
  for (int a = 0; a < size; ++a) {
    for (int b = a + 1; b < size; ++b)
      std::tie(all[a].links[b], all[b].links[a]) = make_socket_pair();
  }
  return all;
}

std::shared_ptr<Mapping> map_control(const RankParts& parts) {
  struct stat about {};
  if (fstat(parts.control.get(), &about) != 0 ||
      about.st_size < static_cast<off_t>(ControlView::bytes(parts.size))) {
    throw CommError("[comm] the world's control memory is missing or too small");
  }
  return Mapping::of_file(parts.control.get(), static_cast<size_t>(about.st_size), true);
}

bool send_parts(int socket, const RankParts& parts) {
  const MoreOpenFiles more(static_cast<rlim_t>(parts.size) * parts.size +
                           256);  // Counts what is under way, too.
  std::vector<int> descriptors{parts.control.get()};
  for (int rank = 0; rank < parts.size; ++rank) {
    if (rank != parts.rank) descriptors.push_back(parts.links[rank].get());
  }
  return send_message(socket, bytes_of(PartsHeader{kPartsMagic, parts.rank, parts.size}),
                      descriptors);
}

RankParts receive_parts(int socket, double timeout_s) {
  Message message = receive_message(socket, timeout_s);
  PartsHeader header;
  if (message.bytes.empty()) {
    throw CommError(message.closed ? "[comm] whoever starts the ranks has gone"
                                   : cat("[comm] did not hear from whoever starts the ranks for ",
                                         timeout_s, " s"));
  }
  if (message.bytes.size() == sizeof(header))
    std::memcpy(&header, message.bytes.data(), sizeof(header));
  const bool good = message.bytes.size() == sizeof(header) && header.magic == kPartsMagic &&
                    header.size >= 1 && header.size <= kMaxRanks && header.rank >= 0 &&
                    header.rank < header.size &&
                    message.descriptors.size() == static_cast<size_t>(header.size);
  if (!good)
    throw CommError(
        "[comm] got something else than a rank's place; are all ranks the same program?");
  RankParts parts;
  parts.rank = header.rank;
  parts.size = header.size;
  parts.links.resize(header.size);
  auto next = message.descriptors.begin();
  parts.control = std::move(*next++);
  for (int rank = 0; rank < header.size; ++rank) {
    if (rank != header.rank) parts.links[rank] = std::move(*next++);
  }
  return parts;
}

std::unique_ptr<Communicator> join_shm(RankParts parts, const CommOptions& options) {
  auto memory = map_control(parts);
  parts.control.reset();
  return std::make_unique<ShmCommunicator>(std::move(parts), memory, options);
}

}  // namespace fsdp::comm
