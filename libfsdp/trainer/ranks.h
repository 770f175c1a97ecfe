// From one command line to ranks.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/trainer/options.h"

namespace fsdp::trainer {

/// Runs `body` on every rank and returns the exit code of the whole.
///
/// Where nobody has started ranks yet, `check` runs first, once: what it throws is one message
/// before anything was started. Then, with nproc_per_node > 1, this program (`argv`) is started
/// that many times, and each copy comes back here as a rank. In a rank (ours, or one of torchrun,
/// srun, mpirun) only `body` runs. With `deterministic` each rank has one thread unless
/// OMP_NUM_THREADS says otherwise. Throws: what `check` throws; ConfigError when ranks are to be
/// started inside of ranks.
int run_on_ranks(const RankOptions& options, const std::vector<std::string>& argv,
                 const std::function<void()>& check,
                 const std::function<void(comm::Communicator&)>& body);

}  // namespace fsdp::trainer
