// Plays a schedule on several ranks in a random order of events, and looks at what is read.
#pragma once

#include <string>

#include "libfsdp/plan/schedule.h"

namespace fsdp::plan {

/// Runs `schedule` for `steps` steps on `ranks` ranks. Each stream of each rank advances at random,
/// some far slower than others; reads look at the buffer at the start and at the end of their
/// operation, writes leave it torn in between, and a kCollect begins to write at any moment from
/// the begin of its micro-batch on. Returns the first wrong thing that was read, a write into the
/// midst of another, a deadlock, or "" when all went well. What collectives and kCollect touch it
/// takes from their fields; of the model's operations it takes the accesses, as only these tell
/// which units are read.
std::string simulate(const Schedule& schedule, int ranks, int steps, unsigned seed);

}  // namespace fsdp::plan
