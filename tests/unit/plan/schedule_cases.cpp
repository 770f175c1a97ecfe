#include "tests/unit/plan/schedule_cases.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "libfsdp/base/error.h"

namespace fsdp::plan {
namespace {

constexpr int kDeepest = 3;

size_t at(int index) { return static_cast<size_t>(index); }

int between(std::mt19937& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}
bool one_in(std::mt19937& random, int n) { return between(random, 1, n) == 1; }

// A model and its calls, drawn part by part.
class Drawing {
 public:
  Drawing(std::mt19937& random, int max_units) : random_(random) {
    const int units = between(random_, 0, max_units);
    draw_units(units);
    draw_placement(units);
    set_slots();
    input_.recompute = one_in(random_, 3);
    budget_ = 2 * units + 2;
    draw_model_call();
    if (one_in(random_, 4)) draw_model_call();
    train_somebody();
  }

  ScheduleInput input() && { return std::move(input_); }

 private:
  void draw_units(int units) {
    const bool nested = one_in(random_, 2);
    parents_.assign(at(units) + 1, 0);
    std::vector<int> depth(parents_.size(), 0);
    const int frozen_percent = between(random_, 0, 2) * 40;
    for (int unit = 0; unit <= units; ++unit) {
      int& parent = parents_[at(unit)];
      if (nested && unit > 1 && one_in(random_, 2)) parent = between(random_, 1, unit - 1);
      if (depth[at(parent)] == kDeepest) parent = parents_[at(parent)];
      depth[at(unit)] = unit == 0 ? 0 : depth[at(parent)] + 1;
      empty_.push_back(one_in(random_, 10));
      input_.trainable.push_back(!empty_.back() && between(random_, 1, 100) > frozen_percent);
    }
    depth_ = *std::max_element(depth.begin(), depth.end());
  }

  void draw_placement(int units) {
    Placement& p = input_.placement;
    switch (between(random_, 0, 5)) {
      case 0:
        p.home = Home::kResident;
        p.mesh = {between(random_, 1, 4), 1};
        break;
      case 1:
        p.home = Home::kShared;
        p.mesh = {between(random_, 1, 2), 2};
        break;
      default:
        p.mesh =
            one_in(random_, 3) ? Mesh{2, between(random_, 1, 2)} : Mesh{1, between(random_, 1, 4)};
    }
    p.slots = between(random_, std::max(depth_, 1), std::max(units, 1));
    if (one_in(random_, 4)) p.kept_units = between(random_, 0, units);
    p.gradient_slots = between(random_, 1, 3);
    if (one_in(random_, 4)) p.accumulation = Accumulation::kUnsharded;
    if (p.mesh.replicate > 1 && one_in(random_, 2)) p.reduction = Reduction::kTwoLevel;
    if (p.home == Home::kSlot && one_in(random_, 3)) p.stages = between(random_, 1, units + 1);
    input_.micro_batches = between(random_, 1, 4);
  }

  void set_slots() {
    const Layout layout =
        make_layout(make_units(parents_, input_.trainable, empty_), input_.placement.mesh);
    input_.slots = assign_slots(layout, input_.placement);
  }

  void draw_model_call() {
    const bool graph = input_.calls.empty() || !one_in(random_, 3);
    input_.calls.push_back({.graph = graph});
    draw_inside(static_cast<int>(input_.calls.size()) - 1, 0, graph);
  }

  // Calls the units inside `unit` in any order, perhaps again, sometimes not at all.
  void draw_inside(int around, int unit, bool graph) {
    std::vector<int> order;
    for (int child = 1; child < static_cast<int>(parents_.size()); ++child) {
      if (parents_[at(child)] != unit || one_in(random_, 8)) continue;
      order.push_back(child);
      if (one_in(random_, 6)) order.push_back(child);
    }
    std::shuffle(order.begin(), order.end(), random_);
    if (one_in(random_, 6)) add_stranger(around, order);
    for (const int child : order) {
      if (budget_-- <= 0) return;
      // What runs inside a recomputed call is seen without graph; gradients may be switched on
      // again inside a call without.
      const bool seen = one_in(random_, 12) ? !graph : graph;
      input_.calls.push_back({.unit = child, .parent = around, .graph = seen});
      const bool recomputed =
          input_.recompute && seen && unit == 0 && input_.calls[at(around)].parent < 0;
      draw_inside(static_cast<int>(input_.calls.size()) - 1, child, seen && !recomputed);
    }
  }

  // A unit of elsewhere, if no unit around lies in its slot.
  void add_stranger(int around, std::vector<int>& order) {
    if (parents_.size() < 2) return;
    const int stranger = between(random_, 1, static_cast<int>(parents_.size()) - 1);
    for (int call = around; call >= 0; call = input_.calls[at(call)].parent) {
      const int unit = input_.calls[at(call)].unit;
      if (unit == stranger) return;
      if (holds_slot_of(unit, stranger)) return;
    }
    for (int unit = 1; unit < static_cast<int>(parents_.size()); ++unit) {
      // Nor any that lies inside it, and would be called there.
      for (int up = unit; up != 0; up = parents_[at(up)]) {
        if (up != stranger) continue;
        for (int call = around; call >= 0; call = input_.calls[at(call)].parent) {
          if (holds_slot_of(input_.calls[at(call)].unit, unit)) return;
        }
      }
    }
    order.push_back(stranger);
  }

  bool holds_slot_of(int a, int b) const {
    return a != b && input_.slots.slot[at(a)] >= 0 &&
           input_.slots.slot[at(a)] == input_.slots.slot[at(b)];
  }

  // The root, when nobody else can learn.
  void train_somebody() {
    for (const Call& call : input_.calls) {
      if (call.unit != 0 && call.graph && input_.trainable[at(call.unit)]) return;
    }
    empty_[0] = false;
    input_.trainable[0] = true;
    set_slots();
  }

  std::mt19937& random_;
  ScheduleInput input_;
  std::vector<int> parents_;
  std::vector<bool> empty_;
  int depth_ = 0;
  int budget_ = 0;
};

}  // namespace

std::vector<UnitSpec> make_units(const std::vector<int>& parents,
                                 const std::vector<bool>& trainable,
                                 const std::vector<bool>& empty) {
  std::vector<UnitSpec> units;
  for (size_t u = 0; u < parents.size(); ++u) {
    units.push_back({.name = cat("u", u), .params = {}, .parent = parents[u]});
    if (u < empty.size() && empty[u]) continue;
    const auto numel = static_cast<int64_t>(kQuantumNumel * (1 + u % 3));
    units.back().params.push_back(
        {.name = cat("u", u, ".w"), .shape = {numel}, .trainable = trainable[u]});
  }
  return units;
}

ScheduleInput input_for(const std::vector<int>& parents, std::vector<Call> calls,
                        const Placement& placement, int micro_batches) {
  ScheduleInput input;
  input.calls = std::move(calls);
  input.trainable.assign(parents.size(), true);
  input.micro_batches = micro_batches;
  input.placement = placement;
  input.slots =
      assign_slots(make_layout(make_units(parents, input.trainable), placement.mesh), placement);
  return input;
}

ScheduleInput simple_input(int units, int slots, int gradient_slots, int micro_batches) {
  std::vector<int> order(at(units));
  std::iota(order.begin(), order.end(), 1);
  Placement placement;
  placement.mesh = {1, 2};
  placement.slots = slots;
  placement.gradient_slots = gradient_slots;
  return input_for(std::vector<int>(at(units) + 1, 0), calls_in_order(order), placement,
                   micro_batches);
}

ScheduleInput with_home(ScheduleInput input, Home home) {
  input.placement.home = home;
  if (home != Home::kSlot) {
    std::fill(input.slots.slot.begin(), input.slots.slot.end(), -1);
    input.slots.slot_bytes.assign(1, 0);
  }
  return input;
}

ScheduleInput random_input(std::mt19937& random, int max_units) {
  return Drawing(random, max_units).input();
}

std::vector<Model> known_models() {
  using Calls = std::vector<Call>;
  std::vector<Model> models;
  models.push_back({"flat", {0, 0, 0, 0, 0}, calls_in_order({1, 2, 3, 4})});
  models.push_back({"three deep",
                    {0, 0, 1, 2, 0, 4, 5, 4},
                    Calls{{0}, {1, 0}, {2, 1}, {3, 2}, {4, 0}, {5, 4}, {6, 5}, {7, 4}}});
  models.push_back({"one unit twelve times", {0, 0}, calls_in_order(std::vector<int>(12, 1))});
  models.push_back(
      {"encoder and decoder", {0, 0, 0, 0, 0, 0}, calls_in_order({1, 2, 3, 1, 4, 5, 1})});
  models.push_back({"two calls of the model",
                    {0, 0, 0, 2},
                    Calls{{0}, {1, 0}, {2, 0}, {3, 2}, {0}, {1, 4}, {2, 4}, {3, 6}}});
  models.push_back(
      {"without graph",
       {0, 0, 0, 2, 0},
       Calls{{0, -1, false}, {1, 0, false}, {0}, {2, 2}, {3, 3, false}, {1, 2}, {4, 2, false}}});
  return models;
}

std::string describe(const ScheduleInput& input) {
  const Placement& p = input.placement;
  std::string text = cat(input.trainable.size() - 1, " units, ", input.slots.slots(), " slots, ",
                         input.slots.gradient_slots(), " gradient slots, ", input.micro_batches,
                         " micro-batches, mesh ", p.mesh.replicate, "x", p.mesh.shard,
                         p.home == Home::kResident ? ", resident"
                         : p.home == Home::kShared ? ", shared"
                                                   : "",
                         p.accumulation == Accumulation::kUnsharded ? ", unsharded sums" : "",
                         p.reduction == Reduction::kTwoLevel ? ", two levels" : "",
                         p.offloads() ? cat(", ", p.stages, " stages") : "",
                         input.recompute ? ", recompute" : "", "; calls:");
  for (size_t i = 0; i < input.calls.size(); ++i) {
    const Call& call = input.calls[i];
    text += cat(
        " ", i, "=", call.unit, call.parent < 0 ? "" : cat(" in ", call.parent),
        call.graph ? "" : " no graph",
        input.slots.gradient_slot[at(call.unit)] < 0 ? " frozen" : "",
        input.slots.slot[at(call.unit)] < 0 ? "" : cat(" slot ", input.slots.slot[at(call.unit)]),
        ";");
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

const Op& op_like(const Schedule& schedule, OpKind kind, int unit, int micro_batch) {
  const int index = find_op(schedule, kind, unit, micro_batch);
  if (index < 0) throw InternalError(cat("no ", op_name(kind), " of unit ", unit));
  return schedule.ops[at(index)];
}

}  // namespace fsdp::plan
