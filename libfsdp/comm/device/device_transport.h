// Which transport ranks on GPUs take.
#pragma once

#include <memory>
#include <string_view>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/options.h"

namespace fsdp::comm {

/// Names that FSDP_COMM may have besides those of transports of the host.
bool is_device_transport(std::string_view name);

/// The world of `host` with its memory on GPUs: NCCL where every rank has a card of its own, CUDA
/// IPC where ranks of one host share one; `name` ("nccl", "cuda_ipc"; empty = as above) forces it.
///
/// Rank r of a host takes device r modulo its number of devices. Collective over the world. Throws
/// ConfigError, on every rank alike, where a rank has no device or no transport fits.
std::unique_ptr<Communicator> on_device(std::unique_ptr<Communicator> host,
                                        const CommOptions& options, std::string_view name = {});

/// Whether this host seems to have a GPU: looks for the driver's device file, opens no library.
bool host_has_gpu();

}  // namespace fsdp::comm
