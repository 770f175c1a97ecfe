// Inputs of the schedule compiler for tests.
#pragma once

#include <random>
#include <string>

#include "libfsdp/plan/schedule.h"

namespace fsdp::plan {

/// `units` units called in the order of their numbers; everything trainable and with parameters.
ScheduleInput simple_input(int units, int slots, int gradient_slots, int micro_batches);

/// 0 to max_units units in any order of calls, some frozen, some without parameters, in slots or
/// resident, on a mesh of 1 to 4 ranks with one or two axes.
ScheduleInput random_input(std::mt19937& random, int max_units);

/// The fields of `input`, for the text of a failing test.
std::string describe(const ScheduleInput& input);

/// How many operations of `kind` there are.
int count(const Schedule& schedule, OpKind kind);

/// Index of the first operation like this; micro_batch -1 = any. -1 = there is none.
int find_op(const Schedule& schedule, OpKind kind, int unit, int micro_batch = -1);

}  // namespace fsdp::plan
