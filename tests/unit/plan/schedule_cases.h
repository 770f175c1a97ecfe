// Inputs of the schedule compiler for tests.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "libfsdp/plan/schedule.h"

namespace fsdp::plan {

/// Units of 256 to 768 elements inside each other as `parents` says (by unit, the root's is
/// ignored), trainable where `trainable` says so, without parameters where `empty` does.
std::vector<UnitSpec> make_units(const std::vector<int>& parents,
                                 const std::vector<bool>& trainable,
                                 const std::vector<bool>& empty = {});

/// An input for `calls` of such units, all trainable and with parameters.
ScheduleInput input_for(const std::vector<int>& parents, std::vector<Call> calls,
                        const Placement& placement, int micro_batches = 1);

/// `units` units called in the order of their numbers; everything trainable and with parameters.
ScheduleInput simple_input(int units, int slots, int gradient_slots, int micro_batches);

/// `input` with another home, its units in no slots unless that is kSlot.
ScheduleInput with_home(ScheduleInput input, Home home);

/// 0 to max_units units inside each other up to three deep, called in any order, some twice, some
/// never, some without graph, in one call of the model or two; some frozen, some without
/// parameters; in any home and accumulation, on a mesh with one or two axes.
ScheduleInput random_input(std::mt19937& random, int max_units);

/// A model by the shape of its calls.
struct Model {
  std::string name;
  std::vector<int> parents;  ///< By unit.
  std::vector<Call> calls;
};

/// Units three deep, one unit called twelve times, encoder and decoder with a unit in common, two
/// calls of the model, calls without graph.
std::vector<Model> known_models();

/// The fields of `input`, for the text of a failing test.
std::string describe(const ScheduleInput& input);

/// How many operations of `kind` there are.
int count(const Schedule& schedule, OpKind kind);

/// Index of the first operation like this; micro_batch -1 = any. -1 = there is none.
int find_op(const Schedule& schedule, OpKind kind, int unit, int micro_batch = -1);

/// That operation.
const Op& op_like(const Schedule& schedule, OpKind kind, int unit, int micro_batch = -1);

}  // namespace fsdp::plan
