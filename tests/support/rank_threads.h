// Runs a function as each rank of a world of threads.
#pragma once

#include <functional>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/options.h"

namespace fsdp::testing {

/// Runs fn on `world` threads, each with its rank's communicator, and joins them.
///
/// An exception of one rank aborts the others. Every rank that failed is reported by its number: as
/// one gtest failure each inside a test, and together in the returned text, which is empty when all
/// went well. The cause comes before its consequences (CommError).
std::string run_ranks_quietly(int world, const std::function<void(comm::Communicator&)>& fn,
                              const comm::CommOptions& options = {});

/// As above, and adds a gtest failure for every rank that failed.
void run_ranks(int world, const std::function<void(comm::Communicator&)>& fn,
               const comm::CommOptions& options = {});

}  // namespace fsdp::testing
