// TCP connections between hosts, and frames on them.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>

#include "libfsdp/comm/os/unix_socket.h"

namespace fsdp::comm {

/// Listens on `host`'s address only, on `port` (0 = any free one). Throws CommError.
FileDescriptor listen_tcp(const std::string& host, int port);

/// Connects, again and again until `timeout_s` is over. Throws CommError.
FileDescriptor connect_tcp(const std::string& host, int port, double timeout_s);

/// A new connection; none if there is none. `from` becomes its numeric address.
FileDescriptor accept_tcp(int listener, std::string& from);

/// This end's port and numeric address.
int local_port(int socket);
std::string local_address(int socket);

/// Lets the system end a connection whose other host has not answered for `seconds`.
///
/// Only silence of the other *host* counts: one that reads slowly, or whose process is stopped,
/// still answers. Idle connections are probed. Does nothing to what is no TCP socket.
void end_when_unreachable(int socket, double seconds);

/// A message on a byte stream.
struct Frame {
  uint32_t type = 0;
  std::string bytes;
};

/// Cuts a stream of bytes into frames. Does not block.
class FrameReader {
 public:
  enum class Status { kOpen, kClosed };
  /// Takes what has arrived. kClosed: the other end is gone, or sent no frames of ours.
  Status read_from(int socket);
  std::optional<Frame> next();

 private:
  std::string bytes_;
  size_t at_ = 0;
  bool damaged_ = false;
};

/// Frames on their way out. Does not block.
class FrameWriter {
 public:
  void push(uint32_t type, std::string_view bytes);
  /// Hands to the system what it takes. False: the other end is gone.
  bool flush(int socket);
  bool empty() const { return at_ == bytes_.size(); }

 private:
  std::string bytes_;
  size_t at_ = 0;
};

/// The bytes of a plain value.
template <class T>
std::string_view as_bytes(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}

/// Takes a plain value from the front of `bytes`; false if there are too few.
template <class T>
bool take(std::string_view& bytes, T& value) {
  if (bytes.size() < sizeof(T)) return false;
  std::memcpy(&value, bytes.data(), sizeof(T));
  bytes.remove_prefix(sizeof(T));
  return true;
}

}  // namespace fsdp::comm
