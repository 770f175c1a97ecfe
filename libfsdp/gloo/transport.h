// gloo as a way for comm::join to reach ranks on other hosts.
#pragma once

#include "libfsdp/comm/join.h"

namespace fsdp::gloo {

/// For comm::JoinOptions::transports: worlds of several hosts without GPUs, and, with
/// FSDP_COMM=gloo, of one host. Ranks listen, besides rank 0's rendezvous, at an ephemeral port of
/// the address by which they reach it, where gloo takes its connections.
comm::Transport transport();

}  // namespace fsdp::gloo
