#include "libfsdp/comm/os/tcp_socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <memory>
#include <thread>

#include "libfsdp/base/error.h"

namespace fsdp::comm {
namespace {

constexpr size_t kMaxFrameBytes = 1 << 20;

struct FrameHeader {
  uint32_t bytes = 0;
  uint32_t type = 0;
};

using Addresses = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

Addresses resolve(const std::string& host, int port, int flags) {
  addrinfo wanted{};
  wanted.ai_family = AF_UNSPEC;
  wanted.ai_socktype = SOCK_STREAM;
  wanted.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &wanted, &found);
  if (error != 0) throw CommError(cat("[comm] cannot resolve '", host, "': ", gai_strerror(error)));
  return {found, freeaddrinfo};
}

FileDescriptor new_socket(const addrinfo& address, int flags) {
  return FileDescriptor(
      socket(address.ai_family, address.ai_socktype | SOCK_CLOEXEC | flags, address.ai_protocol));
}

void set_option(int socket, int level, int name, int value) {
  setsockopt(socket, level, name, &value, sizeof(value));
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// One try of one address within `timeout_s`; none and errno.
FileDescriptor try_connect(const addrinfo& address, double timeout_s) {
  FileDescriptor made = new_socket(address, SOCK_NONBLOCK);
  if (!made) return {};
  if (connect(made.get(), address.ai_addr, address.ai_addrlen) != 0 && errno != EINPROGRESS)
    return {};
  pollfd ready{made.get(), POLLOUT, 0};
  if (poll(&ready, 1, static_cast<int>(timeout_s * 1000)) <= 0) {
    errno = ETIMEDOUT;
    return {};
  }
  int error = 0;
  socklen_t length = sizeof(error);
  getsockopt(made.get(), SOL_SOCKET, SO_ERROR, &error, &length);
  errno = error;
  if (error != 0) return {};
  set_option(made.get(), IPPROTO_TCP, TCP_NODELAY, 1);
  return made;
}

std::pair<std::string, int> name_of(const sockaddr_storage& address, socklen_t length) {
  std::array<char, NI_MAXHOST> host{};
  std::array<char, NI_MAXSERV> port{};
  if (getnameinfo(reinterpret_cast<const sockaddr*>(&address), length, host.data(), host.size(),
                  port.data(), port.size(), NI_NUMERICHOST | NI_NUMERICSERV) != 0)
    return {"?", 0};
  return {host.data(), std::atoi(port.data())};
}

std::pair<std::string, int> local_name(int socket) {
  sockaddr_storage address{};
  socklen_t length = sizeof(address);
  if (getsockname(socket, reinterpret_cast<sockaddr*>(&address), &length) != 0) return {"?", 0};
  return name_of(address, length);
}

}  // namespace

FileDescriptor listen_tcp(const std::string& host, int port) {
  const Addresses addresses = resolve(host, port, 0);
  int error = 0;
  for (const addrinfo* one = addresses.get(); one != nullptr; one = one->ai_next) {
    FileDescriptor listener = new_socket(*one, SOCK_NONBLOCK);
    if (!listener) continue;
    set_option(listener.get(), SOL_SOCKET, SO_REUSEADDR, 1);
    if (bind(listener.get(), one->ai_addr, one->ai_addrlen) == 0 &&
        listen(listener.get(), SOMAXCONN) == 0)
      return listener;
    error = errno;
  }
  throw CommError(
      cat("[comm] rank 0 cannot listen on ", host, ":", port, ": ", strerror(error),
          ". Hint: MASTER_ADDR must be an address of rank 0's host; FSDP_RENDEZVOUS_PORT "
          "chooses another port, on all ranks."));
}

FileDescriptor connect_tcp(const std::string& host, int port, double timeout_s) {
  const double end = seconds_now() + timeout_s;
  int error = 0;
  for (;;) {
    const Addresses addresses = resolve(host, port, 0);
    for (const addrinfo* one = addresses.get(); one != nullptr; one = one->ai_next) {
      FileDescriptor made = try_connect(*one, std::clamp(end - seconds_now(), 0.01, 3.0));
      if (made) return made;
      error = errno;
    }
    if (seconds_now() >= end) {
      throw CommError(cat("[comm] no rank 0 at ", host, ":", port, " within ", timeout_s,
                          " s: ", strerror(error),
                          ". Hint: MASTER_ADDR and MASTER_PORT must be the same on all hosts, and "
                          "the port reachable."));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

FileDescriptor accept_tcp(int listener, std::string& from) {
  sockaddr_storage address{};
  socklen_t length = sizeof(address);
  FileDescriptor made(accept4(listener, reinterpret_cast<sockaddr*>(&address), &length,
                              SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (made) {
    from = name_of(address, length).first;
    set_option(made.get(), IPPROTO_TCP, TCP_NODELAY, 1);
  }
  return made;
}

int local_port(int socket) { return local_name(socket).second; }
std::string local_address(int socket) { return local_name(socket).first; }

void end_when_unreachable(int socket, double seconds) {
  const int whole = std::max(2, static_cast<int>(seconds));
  set_option(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(seconds * 1000));
  set_option(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(socket, IPPROTO_TCP, TCP_KEEPIDLE, std::max(1, whole / 4));
  set_option(socket, IPPROTO_TCP, TCP_KEEPINTVL, std::max(1, whole / 8));
  set_option(socket, IPPROTO_TCP, TCP_KEEPCNT, 6);
}

FrameReader::Status FrameReader::read_from(int socket) {
  bytes_.erase(0, at_);
  at_ = 0;
  std::array<char, 16384> part;
  for (int resets = 0;;) {
    const ssize_t got = recv(socket, part.data(), part.size(), MSG_DONTWAIT);
    if (got > 0) {
      bytes_.append(part.data(), static_cast<size_t>(got));
    } else if (got == 0) {
      return Status::kClosed;
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return damaged_ ? Status::kClosed : Status::kOpen;
    } else if (errno != EINTR && resets++ > 0) {
      return Status::kClosed;  // Said twice: nothing that was sent before is left to read.
    }
  }
}

std::optional<Frame> FrameReader::next() {
  std::string_view rest = std::string_view(bytes_).substr(at_);
  FrameHeader header;
  if (damaged_ || !take(rest, header)) return std::nullopt;
  damaged_ = header.bytes > kMaxFrameBytes;
  if (damaged_ || rest.size() < header.bytes) return std::nullopt;
  at_ += sizeof(header) + header.bytes;
  return Frame{header.type, std::string(rest.substr(0, header.bytes))};
}

void FrameWriter::push(uint32_t type, std::string_view bytes) {
  check(bytes.size() <= kMaxFrameBytes, "frame size");
  bytes_ += as_bytes(FrameHeader{static_cast<uint32_t>(bytes.size()), type});
  bytes_ += bytes;
}

bool FrameWriter::flush(int socket) {
  while (!empty()) {
    const ssize_t sent =
        send(socket, bytes_.data() + at_, bytes_.size() - at_, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
    at_ += static_cast<size_t>(sent);
  }
  bytes_.clear();
  at_ = 0;
  return true;
}

}  // namespace fsdp::comm
