#include "tests/unit/plan/schedule_cases.h"

#include <algorithm>

#include "libfsdp/base/error.h"

namespace fsdp::plan {
namespace {

int between(std::mt19937& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

}  // namespace

ScheduleInput simple_input(int units, int slots, int gradient_slots, int micro_batches) {
  ScheduleInput input;
  for (int unit = 1; unit <= units; ++unit) input.forward_order.push_back(unit);
  input.trainable.assign(static_cast<size_t>(units) + 1, true);
  input.has_params.assign(static_cast<size_t>(units) + 1, true);
  input.micro_batches = micro_batches;
  input.placement.mesh = {1, 2};
  input.placement.slots = slots;
  input.placement.gradient_slots = gradient_slots;
  return input;
}

ScheduleInput random_input(std::mt19937& random, int max_units) {
  const int units = between(random, 0, max_units);
  ScheduleInput input = simple_input(units, between(random, 1, std::max(units, 1)),
                                     between(random, 1, 3), between(random, 1, 4));
  std::shuffle(input.forward_order.begin(), input.forward_order.end(), random);
  // Sometimes a unit is never called.
  if (units > 1 && between(random, 0, 4) == 0) input.forward_order.pop_back();
  const int frozen_percent = between(random, 0, 2) * 40;
  for (size_t unit = 0; unit < input.trainable.size(); ++unit) {
    input.has_params[unit] = between(random, 0, 9) != 0;
    input.trainable[unit] = input.has_params[unit] && between(random, 1, 100) > frozen_percent;
  }
  const int somebody = input.forward_order.empty() ? 0 : input.forward_order.front();
  input.has_params[static_cast<size_t>(somebody)] = true;
  input.trainable[static_cast<size_t>(somebody)] = true;
  input.placement.home = between(random, 0, 3) == 0 ? Home::kResident : Home::kSlot;
  input.placement.mesh =
      between(random, 0, 2) == 0 ? Mesh{2, between(random, 1, 2)} : Mesh{1, between(random, 1, 4)};
  return input;
}

std::string describe(const ScheduleInput& input) {
  std::string text =
      cat(input.forward_order.size(), " units, ", input.placement.slots, " slots, ",
          input.placement.gradient_slots, " gradient slots, ", input.micro_batches,
          " micro-batches, mesh ", input.placement.mesh.replicate, "x", input.placement.mesh.shard,
          input.placement.home == Home::kResident ? ", resident" : "", "; order:");
  for (const int unit : input.forward_order) {
    text += cat(" ", unit, input.trainable[static_cast<size_t>(unit)] ? "" : "f",
                input.has_params[static_cast<size_t>(unit)] ? "" : "e");
  }
  return text;
}

int count(const Schedule& schedule, OpKind kind) {
  return static_cast<int>(std::count_if(schedule.ops.begin(), schedule.ops.end(),
                                        [kind](const Op& op) { return op.kind == kind; }));
}

int find_op(const Schedule& schedule, OpKind kind, int unit, int micro_batch) {
  for (size_t i = 0; i < schedule.ops.size(); ++i) {
    const Op& op = schedule.ops[i];
    if (op.kind == kind && op.unit == unit && (micro_batch < 0 || op.micro_batch == micro_batch)) {
      return static_cast<int>(i);
    }
  }
  return -1;
}

}  // namespace fsdp::plan
