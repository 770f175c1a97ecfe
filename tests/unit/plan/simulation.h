// Plays a schedule on several ranks in a random order of events, and looks at what is read.
#pragma once

#include <string>

#include "libfsdp/plan/schedule.h"

namespace fsdp::plan {

/// Runs `schedule` for `steps` steps on `ranks` ranks. Each stream of each rank advances at random,
/// some far slower than others; reads look at the buffer at the start and at the end of their
/// operation, writes leave it torn in between. Returns the first wrong thing that was read, a
/// deadlock, or "" when all went well. Uses the fields of operations, not their accesses, except
/// for which operations touch the root.
std::string simulate(const Schedule& schedule, int ranks, int steps, unsigned seed);

}  // namespace fsdp::plan
