// What a transport of devices must do, through its Compute alone: on a device, or on one that
// stands in.
#pragma once

#include <cstdint>
#include <vector>

#include "libfsdp/comm/communicator.h"

namespace fsdp::testing {

/// Floats whose sums over ranks depend on the order of additions.
std::vector<float> values_of(int rank, int64_t numel, int round);

/// Gathers and folds of the whole world, whose sources are overwritten as soon as they are
/// released, many times over; the sums are bit for bit those in rank order. Throws what is wrong.
void gather_and_fold(comm::Communicator& c);

}  // namespace fsdp::testing
