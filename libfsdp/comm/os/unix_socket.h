// UNIX sockets that keep message boundaries and carry file descriptors.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fsdp::comm {

/// Owns a file descriptor.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~FileDescriptor() { reset(); }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }
  void reset();
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

/// Two connected ends, close-on-exec. Throws HostResourceError.
std::pair<FileDescriptor, FileDescriptor> make_socket_pair();

/// Sends one message (1 to 60,000 bytes) with copies of up to 250 descriptors. Blocks while the
/// peer's queue is full. False if the peer is gone. Throws HostResourceError for everything else.
bool send_message(int socket, std::string_view bytes, const std::vector<int>& descriptors = {});

struct Message {
  std::string bytes;
  std::vector<FileDescriptor> descriptors;
  bool closed = false;  ///< The peer is gone and its queue is empty.
};

/// Waits up to `timeout_s` for a message; empty bytes and not closed = time is over.
/// Throws HostResourceError, also when this process has no room for the message's descriptors.
Message receive_message(int socket, double timeout_s);

/// True once the other end is closed, even if messages are still queued.
bool peer_closed(int socket);

}  // namespace fsdp::comm
