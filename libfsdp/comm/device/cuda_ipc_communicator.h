// Ranks of one host that share GPUs, which NCCL refuses.
#pragma once

#include <memory>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/options.h"
#include "libfsdp/kernels/compute.h"

namespace fsdp::comm {

/// Makes the world of `host` one whose memory is on GPUs that all ranks reach. Collective over the
/// world.
///
/// Ranks map each other's device memory (CUDA IPC). A gather is copies from the peers' memory, a
/// fold one kernel that reads it, in rank order: the bits of the host's transports. finish blocks
/// the host until all members have begun, as on the host; then everything is ordered on the device
/// by events that the processes share. Tags are compared before data is used. Blocks that were
/// allocated live as long as the communicator. Throws ConfigError unless the ranks of `host` map
/// each other's memory (shm; threads only where device memory is a stand-in for tests).
std::unique_ptr<Communicator> make_cuda_ipc(std::unique_ptr<Communicator> host,
                                            std::shared_ptr<kernels::Compute> compute,
                                            const CommOptions& options = {});

}  // namespace fsdp::comm
