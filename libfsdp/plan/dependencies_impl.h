// Shared by the sources of the schedule compiler; not part of the interface.
#pragma once

#include "libfsdp/plan/schedule.h"

namespace fsdp::plan::detail {

/// Fills `after` of every operation from the accesses and the issue order: the smallest set of
/// dependencies that orders all conflicting accesses when the step is run again and again on every
/// rank of schedule.mesh.
void add_dependencies(Schedule& schedule);

}  // namespace fsdp::plan::detail
