// Shared by the sources of the race checker; not part of the interface.
#pragma once

#include <vector>

#include "libfsdp/plan/race_check.h"

namespace fsdp::plan::detail {

/// Follows what every buffer holds when `schedule`, whose accesses are all ordered, runs `steps`
/// times, and appends each access that finds the wrong contents.
///
/// One rank is enough: with every access ordered, all ranks see the contents of the issue order.
void check_contents(const Schedule& schedule, int steps, std::vector<Race>& races);

}  // namespace fsdp::plan::detail
