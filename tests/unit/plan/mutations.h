// Broken copies of a schedule: each must make somebody object.
#pragma once

#include <string>
#include <vector>

#include "libfsdp/plan/schedule.h"

namespace fsdp::plan {

struct Mutation {
  std::string what;
  Schedule schedule;
};

/// Without the dependency number `dependency` of operation `op`.
Schedule without_dependency(Schedule schedule, int op, int dependency);
/// Without operation `op`. Who waited for it waits no more, but the next operation of its stream
/// waits for what it waited for, so that the order of the rest is left alone.
Schedule without_op(Schedule schedule, int op);
/// With operation `from` issued at position `to`; dependencies follow their operations.
Schedule with_op_moved(const Schedule& schedule, int from, int to);
/// With operation `op` using parameter slot `slot`, in its accesses too.
Schedule with_slot(Schedule schedule, int op, int slot);
/// With operation `op` using gradient slot `slot`, in its accesses too.
Schedule with_gradient_slot(Schedule schedule, int op, int slot);

/// With operation `op` using stage `stage`, in its accesses too.
Schedule with_stage(Schedule schedule, int op, int stage);

/// Every schedule that lacks one dependency.
std::vector<Mutation> dropped_dependencies(const Schedule& schedule);
/// Every schedule that lacks one operation of `kind`.
std::vector<Mutation> dropped_ops(const Schedule& schedule, OpKind kind);
/// Every schedule with two neighbours in the issue order exchanged.
std::vector<Mutation> swapped_neighbours(const Schedule& schedule);
/// Every schedule with one operation in another slot, gradient slot or stage than compiled.
std::vector<Mutation> changed_slots(const Schedule& schedule);

}  // namespace fsdp::plan
