#include "libfsdp/comm/os/unix_socket.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "libfsdp/base/error.h"

namespace fsdp::comm {
namespace {

constexpr size_t kMaxBytes = 60'000;
constexpr size_t kMaxDescriptors = 250;

struct alignas(cmsghdr) ControlSpace {
  char bytes[CMSG_SPACE(sizeof(int) * kMaxDescriptors)] = {};
};

[[noreturn]] void fail(std::string_view what) {
  throw HostResourceError(cat("[comm] ", what, ": ", strerror(errno)));
}

void attach(msghdr& header, ControlSpace& space, const std::vector<int>& descriptors) {
  if (descriptors.empty()) return;
  header.msg_control = space.bytes;
  header.msg_controllen = CMSG_SPACE(sizeof(int) * descriptors.size());
  cmsghdr* control = CMSG_FIRSTHDR(&header);
  control->cmsg_level = SOL_SOCKET;
  control->cmsg_type = SCM_RIGHTS;
  control->cmsg_len = CMSG_LEN(sizeof(int) * descriptors.size());
  std::memcpy(CMSG_DATA(control), descriptors.data(), sizeof(int) * descriptors.size());
}

std::vector<FileDescriptor> take_descriptors(msghdr& header) {
  std::vector<FileDescriptor> taken;
  for (cmsghdr* control = CMSG_FIRSTHDR(&header); control != nullptr;
       control = CMSG_NXTHDR(&header, control)) {
    if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(control) + i * sizeof(int), sizeof(int));
      taken.emplace_back(fd);
    }
  }
  return taken;
}

}  // namespace

void FileDescriptor::reset() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

std::pair<FileDescriptor, FileDescriptor> make_socket_pair() {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0)
    fail("cannot make a socket pair");
  return {FileDescriptor(ends[0]), FileDescriptor(ends[1])};
}

bool send_message(int socket, std::string_view bytes, const std::vector<int>& descriptors) {
  check(!bytes.empty() && bytes.size() <= kMaxBytes && descriptors.size() <= kMaxDescriptors,
        "message size");
  iovec part{const_cast<char*>(bytes.data()), bytes.size()};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  ControlSpace space;
  attach(header, space, descriptors);
  ssize_t sent;
  do {
    sent = sendmsg(socket, &header, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent >= 0) return true;
  if (errno == EPIPE || errno == ECONNRESET || errno == ENOTCONN) return false;
  fail("cannot send to a rank");
}

Message receive_message(int socket, double timeout_s) {
  pollfd ready{socket, POLLIN, 0};
  if (poll(&ready, 1, static_cast<int>(timeout_s * 1000)) <= 0) return {};
  Message message;
  message.bytes.resize(kMaxBytes);
  iovec part{message.bytes.data(), message.bytes.size()};
  ControlSpace space;
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = space.bytes;
  header.msg_controllen = sizeof(space.bytes);
  ssize_t got;
  int resets = 0;
  do {
    got = recvmsg(socket, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    // A peer that ends without reading all it was sent is a reset, said once, before the messages
    // it has sent itself.
  } while (got < 0 && (errno == EINTR || (errno == ECONNRESET && resets++ == 0)));
  if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return {};
  if (got < 0 && errno != ECONNRESET) fail("cannot receive from a rank");
  message.bytes.resize(got < 0 ? 0 : static_cast<size_t>(got));
  message.closed = got <= 0;
  message.descriptors = take_descriptors(header);
  if ((header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) {
    throw HostResourceError(
        "[comm] a message lost its descriptors: too many open files (see ulimit -n)");
  }
  return message;
}

bool peer_closed(int socket) {
  pollfd ready{socket, POLLRDHUP, 0};
  return poll(&ready, 1, 0) > 0 && (ready.revents & (POLLHUP | POLLRDHUP | POLLERR)) != 0;
}

}  // namespace fsdp::comm
