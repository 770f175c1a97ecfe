#include "libfsdp/plan/schedule.h"

#include <algorithm>
#include <map>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/plan/dependencies_impl.h"

namespace fsdp::plan {
namespace {

constexpr int kRoot = 0;

void validate(const ScheduleInput& input) {
  const int units = static_cast<int>(input.trainable.size());
  if (units == 0 || input.has_params.size() != input.trainable.size()) {
    throw ConfigError(cat("cannot compile a schedule: got ", input.trainable.size(),
                          " trainable flags and ", input.has_params.size(),
                          " has_params flags; expected one of each by unit, root included"));
  }
  if (input.micro_batches < 1 || input.placement.slots < 1 || input.placement.gradient_slots < 1) {
    throw ConfigError(cat("cannot compile a schedule: got ", input.micro_batches,
                          " micro-batches, ", input.placement.slots, " slots and ",
                          input.placement.gradient_slots,
                          " gradient slots; expected at least 1 of each"));
  }
  std::vector<bool> called(static_cast<size_t>(units));
  bool any_trainable = input.trainable[kRoot];
  for (const int unit : input.forward_order) {
    if (unit <= kRoot || unit >= units) {
      throw ConfigError(
          cat("cannot compile a schedule: unit ", unit, " is called; expected 1 to ", units - 1));
    }
    if (called[static_cast<size_t>(unit)]) {
      throw ConfigError(
          cat("unit ", unit,
              " is called twice in a micro-batch. Hint: a module that is used twice must "
              "not be a unit of its own; make the module around both uses the unit"));
    }
    called[static_cast<size_t>(unit)] = true;
    any_trainable = any_trainable || input.trainable[static_cast<size_t>(unit)];
  }
  if (!any_trainable)
    throw ConfigError(
        "no unit that is called has a trainable parameter: there is nothing to train");
}

class Compiler {
 public:
  explicit Compiler(const ScheduleInput& input)
      : input_(input),
        resident_(input.placement.home == Home::kResident),
        calls_(input.forward_order.size()) {
    schedule_.mesh = input.placement.mesh;
    schedule_.slots = resident_ ? 0 : input.placement.slots;
    schedule_.gradient_slots = input.placement.gradient_slots;
    schedule_.micro_batches = input.micro_batches;
    assign_slots();
  }

  Schedule run() {
    find_uses();
    for (const int slot : first_contents_) gather_next(slot);
    for (int m = 0; m < input_.micro_batches; ++m) micro_batch(m);
    finish_step();
    detail::add_dependencies(schedule_);
    return std::move(schedule_);
  }

 private:
  // What a slot holds in turn: one entry for each gather that it needs.
  struct Content {
    int unit = 0;
    int micro_batch = 0;  // Of the first use.
    int uses = 0;
  };

  bool trainable(int unit) const { return input_.trainable[static_cast<size_t>(unit)]; }
  bool has_params(int unit) const { return input_.has_params[static_cast<size_t>(unit)]; }
  int slot(int unit) const { return slot_of_[static_cast<size_t>(unit)]; }
  int gradient_slot(int unit) const { return gradient_slot_of_[static_cast<size_t>(unit)]; }

  void assign_slots() {
    slot_of_.assign(input_.trainable.size(), -1);
    gradient_slot_of_.assign(input_.trainable.size(), -1);
    if (!resident_) {
      if (has_params(kRoot)) slot_of_[kRoot] = schedule_.slots;
      for (size_t i = 0; i < calls_; ++i) {
        const int unit = input_.forward_order[i];
        if (has_params(unit))
          slot_of_[static_cast<size_t>(unit)] = slot_of_call(static_cast<int>(i), schedule_.slots);
      }
    }
    if (trainable(kRoot)) gradient_slot_of_[kRoot] = schedule_.gradient_slots;
    int backward = 0;
    for (size_t i = calls_; i-- > 0;) {
      const int unit = input_.forward_order[i];
      if (trainable(unit))
        gradient_slot_of_[static_cast<size_t>(unit)] = backward++ % schedule_.gradient_slots;
    }
  }

  // Collects the contents of every slot over the whole step, so that a gather can be issued at the
  // last use of what lies there before, however far away its own first use is.
  void find_uses() {
    if (slot(kRoot) >= 0) first_contents_.push_back(slot(kRoot));
    for (int m = 0; m < input_.micro_batches; ++m) {
      note_use(kRoot, m);
      for (size_t i = 0; i < calls_; ++i) note_use(input_.forward_order[i], m);
      for (size_t i = calls_; i-- > 0;) note_use(input_.forward_order[i], m);
      note_use(kRoot, m);
    }
  }

  void note_use(int unit, int m) {
    if (slot(unit) < 0) return;
    std::vector<Content>& contents = contents_[slot(unit)];
    if (contents.empty() && unit != kRoot) first_contents_.push_back(slot(unit));
    if (contents.empty() || contents.back().unit != unit) contents.push_back({unit, m, 0});
    ++contents.back().uses;
  }

  void micro_batch(int m) {
    compute(OpKind::kForward, kRoot, m);
    for (size_t i = 0; i < calls_; ++i) compute(OpKind::kForward, input_.forward_order[i], m);
    for (size_t i = calls_; i-- > 0;) backward_and_reduce(input_.forward_order[i], m);
    backward_and_reduce(kRoot, m);
  }

  void backward_and_reduce(int unit, int m) {
    compute(OpKind::kBackward, unit, m);
    if (!trainable(unit)) return;
    const bool accumulate = m > 0;
    Op op{.kind = OpKind::kReduce, .unit = unit, .micro_batch = m};
    op.gradient_slot = gradient_slot(unit);
    op.accumulate = accumulate;
    op.accesses.push_back({BufferKind::kGradientSlot, op.gradient_slot, false, true});
    if (accumulate) op.accesses.push_back({BufferKind::kGradientShard, unit, false, false});
    op.accesses.push_back({BufferKind::kGradientShard, unit, true, false});
    schedule_.ops.push_back(std::move(op));
  }

  // A forward or backward, and the gather that its slot is free for afterwards.
  void compute(OpKind kind, int unit, int m) {
    Op op{.kind = kind, .unit = unit, .micro_batch = m, .slot = slot(unit)};
    read_parameters(unit, op);
    if (unit != kRoot) read_parameters(kRoot, op);
    if (kind == OpKind::kBackward) {
      op.gradient_slot = gradient_slot(unit);
      if (unit != kRoot && trainable(unit)) write_gradients(unit, op);
      if (trainable(kRoot)) write_gradients(kRoot, op);
    }
    schedule_.ops.push_back(std::move(op));
    if (slot(unit) >= 0 && --contents_[slot(unit)][next_[slot(unit)] - 1].uses == 0)
      gather_next(slot(unit));
  }

  void read_parameters(int unit, Op& op) const {
    if (!has_params(unit)) return;
    if (resident_) {
      op.accesses.push_back({BufferKind::kShard, unit, false, false});
    } else {
      op.accesses.push_back({BufferKind::kSlot, slot(unit), false, false});
    }
  }

  void write_gradients(int unit, Op& op) const {
    op.accesses.push_back({BufferKind::kGradientSlot, gradient_slot(unit), true, false});
  }

  void gather_next(int slot) {
    const std::vector<Content>& contents = contents_[slot];
    size_t& next = next_[slot];
    if (next == contents.size()) return;
    const Content& content = contents[next++];
    Op op{.kind = OpKind::kGather,
          .unit = content.unit,
          .micro_batch = content.micro_batch,
          .slot = slot};
    op.accesses = {{BufferKind::kShard, content.unit, false, true},
                   {BufferKind::kSlot, slot, true, false}};
    schedule_.ops.push_back(std::move(op));
  }

  void finish_step() {
    Op packet{.kind = OpKind::kPacket, .micro_batch = input_.micro_batches - 1};
    Op optimizer{.kind = OpKind::kOptimizer, .micro_batch = input_.micro_batches - 1};
    std::vector<int> updated = input_.forward_order;
    updated.push_back(kRoot);
    std::sort(updated.begin(), updated.end());
    for (const int unit : updated) {
      if (!trainable(unit)) continue;
      packet.accesses.push_back({BufferKind::kGradientShard, unit, false, false});
      optimizer.accesses.push_back({BufferKind::kGradientShard, unit, false, false});
      optimizer.accesses.push_back({BufferKind::kShard, unit, true, false});
    }
    schedule_.ops.push_back(std::move(packet));
    schedule_.ops.push_back(std::move(optimizer));
  }

  const ScheduleInput& input_;
  const bool resident_;
  const size_t calls_;
  Schedule schedule_;
  std::vector<int> slot_of_;           // By unit; -1 = none.
  std::vector<int> gradient_slot_of_;  // By unit; -1 = none.
  std::vector<int>
      first_contents_;  // Slots in the order of their first gathers: the root's, then by call.
  std::map<int, std::vector<Content>> contents_;  // By slot.
  std::map<int, size_t> next_;                    // By slot: the content to gather next.
};

}  // namespace

bool on_communication_stream(OpKind kind) {
  return kind == OpKind::kGather || kind == OpKind::kReduce;
}

bool is_collective(OpKind kind) { return on_communication_stream(kind) || kind == OpKind::kPacket; }

std::string_view op_name(OpKind kind) {
  switch (kind) {
    case OpKind::kGather:
      return "gather";
    case OpKind::kForward:
      return "forward";
    case OpKind::kBackward:
      return "backward";
    case OpKind::kReduce:
      return "reduce";
    case OpKind::kPacket:
      return "packet";
    case OpKind::kOptimizer:
      return "optimizer";
  }
  throw InternalError("unknown kind of operation");
}

Schedule compile(const ScheduleInput& input) {
  validate(input);
  return Compiler(input).run();
}

}  // namespace fsdp::plan
