// How ranks that somebody else started on one host find each other.
#pragma once

#include <memory>
#include <string>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/options.h"

namespace fsdp::comm {

/// Meets the other ranks of `name` at an abstract UNIX socket: rank 0 makes the world and hands out
/// its parts.
///
/// Only processes of the same user are let in, and the name exists on this host only.
/// Throws CommError if not all ranks come within `timeout_s`, or if two claim the same rank.
std::unique_ptr<Communicator> rendezvous(int rank, int size, const std::string& name,
                                         double timeout_s, const CommOptions& options);

}  // namespace fsdp::comm
