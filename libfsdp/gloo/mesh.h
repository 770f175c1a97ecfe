// Bytes from rank to rank over c10d's gloo. The only file that sees LibTorch's distributed headers
// is mesh.cpp.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "libfsdp/comm/control/control_channel.h"

namespace fsdp::gloo {

/// Bytes under way. Destroying it gives them up.
class Transfer {
 public:
  virtual ~Transfer() = default;
  /// Waits until a send's bytes may be overwritten, or a receive's are there. False if aborted.
  /// Throws CommError when the connection is broken.
  virtual bool wait() = 0;
  /// Makes the wait, now or later, return false. Any thread.
  virtual void abort() = 0;
};

/// One connection between each two ranks.
///
/// Bytes on one channel between two ranks arrive in the order they were sent, and each receive
/// must ask for as many as the send gave. Thread safety: all of it.
class Mesh {
 public:
  /// Collective: meets the other ranks through the control channel's store.
  ///
  /// `address` is this host's, where the others reach it. Connections to hosts that do not answer
  /// for `unreachable_s` are ended. Throws CommError.
  Mesh(comm::ControlChannel& control, int rank, int size, const std::string& address,
       double join_timeout_s, double unreachable_s);
  ~Mesh();

  std::unique_ptr<Transfer> send(int to, int channel, const void* data, size_t bytes);
  std::unique_ptr<Transfer> receive(int from, int channel, void* data, size_t bytes);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace fsdp::gloo
