#include "libfsdp/comm/launch/rendezvous.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/host/shm_world.h"

namespace fsdp::comm {
namespace {

using Clock = std::chrono::steady_clock;

struct Arrival {
  uint32_t magic = 0x61727276;
  int32_t rank = 0;
  int32_t size = 0;
};

class Deadline {
 public:
  explicit Deadline(double seconds)
      : end_(Clock::now() +
             std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds))) {}
  double left_s() const {
    return std::max(0.0, std::chrono::duration<double>(end_ - Clock::now()).count());
  }

 private:
  Clock::time_point end_;
};

struct Address {
  sockaddr_un name{};
  socklen_t length = 0;
};

// A leading NUL makes the name abstract: it is in no directory and goes with its last socket.
Address address_of(const std::string& name) {
  Address address;
  address.name.sun_family = AF_UNIX;
  const std::string full = cat("fsdp/", geteuid(), "/", name);
  const size_t length = std::min(full.size(), sizeof(address.name.sun_path) - 1);
  std::memcpy(address.name.sun_path + 1, full.data() + full.size() - length, length);
  address.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + length);
  return address;
}

FileDescriptor new_socket() {
  FileDescriptor made(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!made) throw HostResourceError(cat("[comm] cannot make a socket: ", strerror(errno)));
  return made;
}

bool same_user(int socket) {
  ucred peer{};
  socklen_t length = sizeof(peer);
  return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 && peer.uid == geteuid();
}

FileDescriptor listen_at(const Address& address, const std::string& name) {
  FileDescriptor listener = new_socket();
  if (bind(listener.get(), reinterpret_cast<const sockaddr*>(&address.name), address.length) != 0 ||
      listen(listener.get(), kMaxRanks) != 0) {
    throw CommError(cat("[comm] rank 0 cannot open the meeting point '", name,
                        "': ", strerror(errno),
                        ". Hint: is another run with the same MASTER_PORT on this host?"));
  }
  return listener;
}

std::string missing_ranks(const std::vector<FileDescriptor>& arrived) {
  std::string text;
  for (size_t rank = 1; rank < arrived.size(); ++rank) {
    if (!arrived[rank]) text += cat(text.empty() ? "" : ", ", rank);
  }
  return text;
}

/// Takes one caller; false if the time is over.
bool accept_one(int listener, std::vector<FileDescriptor>& arrived, const Deadline& deadline) {
  pollfd ready{listener, POLLIN, 0};
  if (poll(&ready, 1, static_cast<int>(deadline.left_s() * 1000)) <= 0)
    return deadline.left_s() > 0;
  FileDescriptor caller(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
  if (!caller || !same_user(caller.get())) return true;
  const Message message = receive_message(caller.get(), std::min(5.0, deadline.left_s()));
  Arrival expected;
  Arrival arrival;
  if (message.bytes.size() != sizeof(arrival)) return true;
  std::memcpy(&arrival, message.bytes.data(), sizeof(arrival));
  if (arrival.magic != expected.magic) return true;
  const int size = static_cast<int>(arrived.size());
  if (arrival.size != size || arrival.rank < 1 || arrival.rank >= size || arrived[arrival.rank]) {
    throw CommError(cat("[comm] a process came as rank ", arrival.rank, " of ", arrival.size,
                        "; rank 0 expected ranks ", missing_ranks(arrived), " of ", size));
  }
  arrived[arrival.rank] = std::move(caller);
  return true;
}

RankParts receive_callers(int size, const std::string& name, const Deadline& deadline) {
  const FileDescriptor listener = listen_at(address_of(name), name);
  std::vector<FileDescriptor> arrived(size);
  while (!missing_ranks(arrived).empty()) {
    if (!accept_one(listener.get(), arrived, deadline)) {
      throw CommError(cat("[comm] these ranks did not come to the meeting point '", name,
                          "': ", missing_ranks(arrived),
                          ". Hint: all ranks must be processes of one host and one user."));
    }
  }
  std::vector<RankParts> parts = make_shm_world(size);
  for (int rank = 1; rank < size; ++rank) {
    if (!send_parts(arrived[rank].get(), parts[rank]))
      throw CommError(cat("[comm] rank ", rank, " left while joining"));
  }
  return std::move(parts[0]);
}

RankParts call(int rank, int size, const std::string& name, const Deadline& deadline) {
  const Address address = address_of(name);
  const FileDescriptor caller = new_socket();
  while (connect(caller.get(), reinterpret_cast<const sockaddr*>(&address.name), address.length) !=
         0) {
    if (deadline.left_s() <= 0) {
      throw CommError(cat("[comm] rank ", rank, " found no rank 0 at the meeting point '", name,
                          "'. Hint: all ranks must be processes of one host and one user."));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  if (!same_user(caller.get())) {
    throw CommError(cat("[comm] the meeting point '", name, "' belongs to another user"));
  }
  Arrival arrival;
  arrival.rank = rank;
  arrival.size = size;
  send_message(caller.get(), {reinterpret_cast<const char*>(&arrival), sizeof(arrival)});
  return receive_parts(caller.get(), deadline.left_s());
}

}  // namespace

std::unique_ptr<Communicator> rendezvous(int rank, int size, const std::string& name,
                                         double timeout_s, const CommOptions& options) {
  if (size > kMaxRanks)
    throw ConfigError(cat("[comm] ", size, " ranks on one host; at most ", kMaxRanks));
  const Deadline deadline(timeout_s);
  return join_shm(
      rank == 0 ? receive_callers(size, name, deadline) : call(rank, size, name, deadline),
      options);
}

}  // namespace fsdp::comm
