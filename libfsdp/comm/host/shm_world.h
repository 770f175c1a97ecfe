// Ranks that are processes of one host: control block and blocks in unnamed memory files, handed
// over UNIX sockets.
#pragma once

#include <memory>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/control/control.h"
#include "libfsdp/comm/options.h"
#include "libfsdp/comm/os/mapping.h"
#include "libfsdp/comm/os/unix_socket.h"

namespace fsdp::comm {

/// What a process needs to become a rank.
struct RankParts {
  int rank = 0;
  int size = 1;
  FileDescriptor control;  ///< The world's control memory.
  std::vector<FileDescriptor>
      links;  ///< One socket to each rank; its hang-up tells of the peer's death. Own: none.
};

/// Makes a world of `size` ranks, 1..128; each set of parts is for one process.
///
/// Memory: 0.5 MiB a rank. Whoever keeps a rank's parts keeps that rank from being noticed as dead:
/// hand them over (send_parts) and drop them. Throws HostResourceError.
std::vector<RankParts> make_shm_world(int size);

/// Maps the control memory, for somebody who watches without being a rank.
std::shared_ptr<Mapping> map_control(const RankParts& parts);

/// Puts parts into a socket's queue; the receiver may start later. False if the other end is
/// closed.
bool send_parts(int socket, const RankParts& parts);

/// Takes parts from a socket. Throws CommError if they do not come within `timeout_s` or are not
/// ours.
RankParts receive_parts(int socket, double timeout_s);

/// Becomes the rank of `parts`.
///
/// allocate: the pages of a block are reserved and mapped, zero, on all ranks when it returns: no
/// page fault and no SIGBUS later. Peers' blocks are mapped read-only. HostResourceError, on every
/// rank alike, when one of them has no room. A thread of this object shows a sign of life every 250
/// ms. All peers notice within about 0.1 s of a wait that this process has ended, however it ended.
std::unique_ptr<Communicator> join_shm(RankParts parts, const CommOptions& options = {});

}  // namespace fsdp::comm
