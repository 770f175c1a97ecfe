// Ranks with a GPU each, over NCCL.
#pragma once

#include <memory>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/options.h"
#include "libfsdp/kernels/compute.h"

namespace fsdp::comm {

/// Makes the world of `host` one whose memory is on GPUs. Collective over the world.
///
/// Symmetric memory is NCCL's own and registered with it; peer() is null. Gathers are ncclAllGather
/// of bytes. Folds send each member its parts and add them in rank order, bit for bit as on the
/// host; with allow_any_order() they are ncclReduceScatter (and ncclAllReduce between replicas) in
/// the source's type, then one addition in fp32. A rank's part of a source must stay the same from
/// fold to fold (CommError).
///
/// Note [Divergence] Tags are not compared before data is used, that would stop the host at each
/// collective. Each rank hashes what it begins; exchange() compares the hashes, so a step's packet
/// does, before the optimizer. A rank that does not come at all leaves the others waiting on the
/// device: a thread ends that after CommOptions::timeout_s of the collective's own time, and on
/// errors of NCCL, and names the collective.
std::unique_ptr<Communicator> make_nccl(std::unique_ptr<Communicator> host,
                                        std::shared_ptr<kernels::Compute> compute,
                                        const CommOptions& options = {});

}  // namespace fsdp::comm
