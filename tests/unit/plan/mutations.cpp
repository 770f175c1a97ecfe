#include "tests/unit/plan/mutations.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "libfsdp/base/error.h"

namespace fsdp::plan {
namespace {

// The operations `order` of `schedule`, in that order; dependencies on others are dropped.
Schedule reordered(const Schedule& schedule, const std::vector<int>& order) {
  std::vector<int> now_at(schedule.ops.size(), -1);
  for (size_t i = 0; i < order.size(); ++i)
    now_at[static_cast<size_t>(order[i])] = static_cast<int>(i);
  Schedule result = schedule;
  result.ops.clear();
  for (const int from : order) {
    Op op = schedule.ops[static_cast<size_t>(from)];
    std::erase_if(op.after,
                  [&](const Dependency& d) { return now_at[static_cast<size_t>(d.op)] < 0; });
    for (Dependency& d : op.after) d.op = now_at[static_cast<size_t>(d.op)];
    result.ops.push_back(std::move(op));
  }
  return result;
}

std::vector<int> identity(const Schedule& schedule) {
  std::vector<int> order(schedule.ops.size());
  std::iota(order.begin(), order.end(), 0);
  return order;
}

void change_access(Op& op, BufferKind buffer, int from, int to) {
  for (Access& access : op.accesses) {
    if (access.buffer == buffer && access.index == from) access.index = to;
  }
}

std::string name(const Schedule& schedule, int op) {
  const Op& o = schedule.ops[static_cast<size_t>(op)];
  return cat("operation ", op, " (", op_name(o.kind), " ", o.unit, ")");
}

}  // namespace

Schedule without_dependency(Schedule schedule, int op, int dependency) {
  std::vector<Dependency>& after = schedule.ops[static_cast<size_t>(op)].after;
  after.erase(after.begin() + dependency);
  return schedule;
}

Schedule without_op(Schedule schedule, int op) {
  const Op& dropped = schedule.ops[static_cast<size_t>(op)];
  for (size_t i = static_cast<size_t>(op) + 1; i < schedule.ops.size(); ++i) {
    Op& heir = schedule.ops[i];
    if (stream_of(heir.kind) != stream_of(dropped.kind)) continue;
    heir.after.insert(heir.after.end(), dropped.after.begin(), dropped.after.end());
    break;
  }
  std::vector<int> order = identity(schedule);
  order.erase(order.begin() + op);
  return reordered(schedule, order);
}

Schedule with_op_moved(const Schedule& schedule, int from, int to) {
  std::vector<int> order = identity(schedule);
  order.erase(order.begin() + from);
  order.insert(order.begin() + to, from);
  return reordered(schedule, order);
}

Schedule with_slot(Schedule schedule, int op, int slot) {
  Op& changed = schedule.ops[static_cast<size_t>(op)];
  change_access(changed, BufferKind::kSlot, changed.slot, slot);
  changed.slot = slot;
  return schedule;
}

Schedule with_gradient_slot(Schedule schedule, int op, int slot) {
  Op& changed = schedule.ops[static_cast<size_t>(op)];
  change_access(changed, BufferKind::kGradientSlot, changed.gradient_slot, slot);
  changed.gradient_slot = slot;
  return schedule;
}

Schedule with_stage(Schedule schedule, int op, int stage) {
  Op& changed = schedule.ops[static_cast<size_t>(op)];
  change_access(changed, BufferKind::kStage, changed.stage, stage);
  changed.stage = stage;
  return schedule;
}

std::vector<Mutation> dropped_dependencies(const Schedule& schedule) {
  std::vector<Mutation> mutations;
  for (int op = 0; op < static_cast<int>(schedule.ops.size()); ++op) {
    const int dependencies = static_cast<int>(schedule.ops[static_cast<size_t>(op)].after.size());
    for (int d = 0; d < dependencies; ++d) {
      mutations.push_back({cat(name(schedule, op), " without its dependency ", d),
                           without_dependency(schedule, op, d)});
    }
  }
  return mutations;
}

std::vector<Mutation> dropped_ops(const Schedule& schedule, OpKind kind) {
  std::vector<Mutation> mutations;
  for (int op = 0; op < static_cast<int>(schedule.ops.size()); ++op) {
    if (schedule.ops[static_cast<size_t>(op)].kind != kind) continue;
    mutations.push_back({cat("without ", name(schedule, op)), without_op(schedule, op)});
  }
  return mutations;
}

std::vector<Mutation> swapped_neighbours(const Schedule& schedule) {
  std::vector<Mutation> mutations;
  for (int op = 0; op + 1 < static_cast<int>(schedule.ops.size()); ++op) {
    mutations.push_back(
        {cat(name(schedule, op), " after its successor"), with_op_moved(schedule, op, op + 1)});
  }
  return mutations;
}

std::vector<Mutation> changed_slots(const Schedule& schedule) {
  std::vector<Mutation> mutations;
  for (int op = 0; op < static_cast<int>(schedule.ops.size()); ++op) {
    const Op& o = schedule.ops[static_cast<size_t>(op)];
    for (int slot = 0; o.slot >= 0 && slot <= schedule.slots; ++slot) {
      if (slot == o.slot) continue;
      mutations.push_back(
          {cat(name(schedule, op), " in slot ", slot), with_slot(schedule, op, slot)});
    }
    for (int stage = 0; o.stage >= 0 && stage < schedule.stages; ++stage) {
      if (stage == o.stage) continue;
      mutations.push_back(
          {cat(name(schedule, op), " in stage ", stage), with_stage(schedule, op, stage)});
    }
    const bool collects = o.kind == OpKind::kCollect || o.kind == OpKind::kReduce;
    for (int slot = 0; collects && o.gradient_slot >= 0 && slot <= schedule.gradient_slots;
         ++slot) {
      if (slot == o.gradient_slot) continue;
      mutations.push_back({cat(name(schedule, op), " in gradient slot ", slot),
                           with_gradient_slot(schedule, op, slot)});
    }
  }
  return mutations;
}

}  // namespace fsdp::plan
