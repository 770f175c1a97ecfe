#include "libfsdp/plan/schedule.h"

#include <algorithm>
#include <map>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/plan/dependencies_impl.h"

namespace fsdp::plan {
namespace {

constexpr int kRoot = 0;

size_t at(int index) { return static_cast<size_t>(index); }

void validate(const ScheduleInput& input) {
  const int units = static_cast<int>(input.trainable.size());
  const bool mapped = input.slots.slot.size() == input.trainable.size() &&
                      input.slots.gradient_slot.size() == input.trainable.size();
  if (units == 0 || !mapped) {
    throw ConfigError(cat("cannot compile a schedule: got ", units, " trainable flags, ",
                          input.slots.slot.size(), " slots and ", input.slots.gradient_slot.size(),
                          " gradient slots; expected one of each by unit, root included"));
  }
  if (input.micro_batches < 1)
    throw ConfigError(cat("cannot compile a schedule of ", input.micro_batches, " micro-batches"));
  for (size_t i = 0; i < input.calls.size(); ++i) {
    const Call& call = input.calls[i];
    const bool root = call.unit == kRoot;
    if (call.unit < 0 || call.unit >= units || call.parent >= static_cast<int>(i) ||
        root != (call.parent < 0)) {
      throw ConfigError(
          cat("cannot compile a schedule: call ", i, " is of unit ", call.unit, " inside call ",
              call.parent, "; there are ", units,
              " units, and those besides the root are called inside an earlier call"));
    }
  }
}

// The calls of one micro-batch as a tree.
class CallTree {
 public:
  CallTree(const std::vector<Call>& calls, bool recompute)
      : calls_(calls), recompute_(recompute), inside_(calls.size()) {
    for (size_t i = 0; i < calls.size(); ++i) {
      if (calls[i].parent < 0) {
        tops_.push_back(static_cast<int>(i));
      } else {
        inside_[at(calls[i].parent)].push_back(static_cast<int>(i));
      }
    }
  }

  const std::vector<int>& tops() const { return tops_; }
  const std::vector<int>& inside(int call) const { return inside_[at(call)]; }
  int unit(int call) const { return calls_[at(call)].unit; }
  int parent(int call) const { return calls_[at(call)].parent; }
  bool is_model(int call) const { return parent(call) < 0; }
  /// Whether its forward runs again in backward, with all that is inside.
  bool recomputed(int call) const {
    return recompute_ && calls_[at(call)].graph && !is_model(call) && is_model(parent(call));
  }
  /// What runs inside a recomputed call gets its graph there.
  bool has_backward(int call) const {
    bool graph = calls_[at(call)].graph;
    for (int around = parent(call); around >= 0 && !graph; around = parent(around))
      graph = recomputed(around);
    return graph;
  }

 private:
  const std::vector<Call>& calls_;
  const bool recompute_;
  std::vector<std::vector<int>> inside_;
  std::vector<int> tops_;
};

class Compiler {
 public:
  explicit Compiler(const ScheduleInput& input)
      : input_(input),
        tree_(input.calls, input.recompute),
        unsharded_(input.placement.accumulation == Accumulation::kUnsharded) {
    schedule_.mesh = input.placement.mesh;
    schedule_.slots = input.slots.slots();
    schedule_.gradient_slots = input.slots.gradient_slots();
    schedule_.micro_batches = input.micro_batches;
  }

  Schedule run() {
    find_last_ends();
    for (micro_batch_ = 0; micro_batch_ < input_.micro_batches; ++micro_batch_) {
      for (const int call : tree_.tops()) forward(call, false);
      for (size_t i = tree_.tops().size(); i-- > 0;) backward(tree_.tops()[i]);
      add_compute(OpKind::kBackward, kRoot, -1);
      collect_and_reduce(kRoot);
    }
    finish_step();
    place_gathers();
    detail::add_dependencies(schedule_);
    return std::move(schedule_);
  }

 private:
  // What a slot holds in turn: one entry for each gather that it needs.
  struct Content {
    int slot = 0;
    int unit = 0;
    int micro_batch = 0;  // Of the first use.
    size_t first = 0;     // Steps that use it.
    size_t last = 0;
  };

  bool trainable(int unit) const { return input_.slots.gradient_slot[at(unit)] >= 0; }
  int slot(int unit) const { return input_.slots.slot[at(unit)]; }

  // A unit's gradients are complete at the end of its last call's backward, in backward order.
  void find_last_ends() {
    bool any = trainable(kRoot);
    for (size_t i = tree_.tops().size(); i-- > 0;) find_last_ends_in(tree_.tops()[i]);
    for (const auto& [unit, call] : last_end_) any = any || trainable(unit);
    if (!any)
      throw ConfigError(
          "no unit that is called has a trainable parameter: there is nothing to train");
  }

  void find_last_ends_in(int call) {
    for (size_t i = tree_.inside(call).size(); i-- > 0;) find_last_ends_in(tree_.inside(call)[i]);
    if (!tree_.is_model(call) && tree_.has_backward(call)) last_end_[tree_.unit(call)] = call;
  }

  void forward(int call, bool in_backward) {
    add_forward(call, in_backward, false);
    for (const int inner : tree_.inside(call)) {
      forward(inner, in_backward);
      if (!tree_.is_model(call)) add_forward(call, in_backward, true);
    }
  }

  void add_forward(int call, bool in_backward, bool resumed) {
    Op& op = add_compute(OpKind::kForward, tree_.unit(call), tree_.parent(call));
    op.in_backward = in_backward;
    op.resumed = resumed;
  }

  void backward(int call) {
    const bool counts = !tree_.is_model(call) && tree_.has_backward(call);
    if (counts) add_compute(OpKind::kBackward, tree_.unit(call), tree_.parent(call));
    if (tree_.recomputed(call)) {
      for (const int inner : tree_.inside(call)) {
        forward(inner, true);
        add_forward(call, true, true);
      }
    }
    const size_t begin = steps_.size();
    for (size_t i = tree_.inside(call).size(); i-- > 0;) backward(tree_.inside(call)[i]);
    if (!counts) return;
    // What the call did before the first unit inside it still reads its parameters.
    if (steps_.size() > begin)
      add_compute(OpKind::kBackward, tree_.unit(call), tree_.parent(call)).resumed = true;
    if (last_end_.at(tree_.unit(call)) == call) collect_and_reduce(tree_.unit(call));
  }

  // A piece of compute of `unit`, called inside the call `around`: reads its parameters and those
  // of all units around it.
  Op& add_compute(OpKind kind, int unit, int around) {
    Op op{.kind = kind, .unit = unit, .micro_batch = micro_batch_, .slot = slot(unit)};
    read_parameters(unit, op);
    for (; around >= 0; around = tree_.parent(around)) read_parameters(tree_.unit(around), op);
    steps_.push_back(std::move(op));
    return steps_.back();
  }

  void read_parameters(int unit, Op& op) const {
    Access access;
    switch (input_.placement.home) {
      case Home::kSlot:
        if (slot(unit) < 0) return;
        access = {.buffer = BufferKind::kSlot, .index = slot(unit), .unit = unit};
        break;
      case Home::kResident:
      case Home::kShared:
        access = {.buffer = BufferKind::kShard, .index = unit};
        access.by_peers = input_.placement.home == Home::kShared;
        break;
    }
    for (const Access& other : op.accesses) {
      if (other == access) return;
      if (other.buffer == BufferKind::kSlot && other.index == access.index) {
        throw ConfigError(cat("units ", unit, " and ", other.unit,
                              " are called inside each other and share slot ", access.index,
                              ". Hint: more slots, at least one for each unit in the longest chain "
                              "of calls inside each other, or units as modules of each other"));
      }
    }
    op.accesses.push_back(access);
  }

  void collect_and_reduce(int unit) {
    if (!trainable(unit)) return;
    const int slot = input_.slots.gradient_slot[at(unit)];
    const bool last = micro_batch_ + 1 == input_.micro_batches;
    Op collect{.kind = OpKind::kCollect, .unit = unit, .micro_batch = micro_batch_};
    collect.gradient_slot = slot;
    collect.accumulate = unsharded_ && micro_batch_ > 0;
    collect.accesses.push_back({BufferKind::kGradientSlot, slot, true, false, unit});
    steps_.push_back(std::move(collect));
    if (unsharded_ && !last) return;
    Op reduce{.kind = OpKind::kReduce, .unit = unit, .micro_batch = micro_batch_};
    reduce.gradient_slot = slot;
    reduce.accumulate = !unsharded_ && micro_batch_ > 0;
    reduce.accesses.push_back({BufferKind::kGradientSlot, slot, false, true, unit});
    if (reduce.accumulate) reduce.accesses.push_back({BufferKind::kGradientShard, unit});
    reduce.accesses.push_back({BufferKind::kGradientShard, unit, true});
    steps_.push_back(std::move(reduce));
  }

  void finish_step() {
    Op packet{.kind = OpKind::kPacket, .micro_batch = input_.micro_batches - 1};
    Op optimizer{.kind = OpKind::kOptimizer, .micro_batch = input_.micro_batches - 1};
    std::vector<int> updated = {kRoot};
    for (const auto& [unit, call] : last_end_) updated.push_back(unit);
    for (const int unit : updated) {
      if (!trainable(unit)) continue;
      packet.accesses.push_back({BufferKind::kGradientShard, unit});
      optimizer.accesses.push_back({BufferKind::kGradientShard, unit});
      optimizer.accesses.push_back({BufferKind::kShard, unit, true});
    }
    steps_.push_back(std::move(packet));
    steps_.push_back(std::move(optimizer));
    if (input_.placement.home == Home::kShared)
      steps_.push_back({.kind = OpKind::kFence, .micro_batch = input_.micro_batches - 1});
  }

  // The contents of every slot over the whole step, so that a gather can be issued at the last use
  // of what lies there before, however far away its own first use is.
  std::vector<Content> find_contents() const {
    std::vector<Content> contents;
    std::map<int, size_t> current;  // By slot.
    for (size_t i = 0; i < steps_.size(); ++i) {
      for (const Access& access : steps_[i].accesses) {
        if (access.buffer != BufferKind::kSlot) continue;
        const auto found = current.find(access.index);
        if (found != current.end() && contents[found->second].unit == access.unit) {
          contents[found->second].last = i;
          continue;
        }
        current[access.index] = contents.size();
        contents.push_back({access.index, access.unit, steps_[i].micro_batch, i, i});
      }
    }
    return contents;
  }

  void place_gathers() {
    const std::vector<Content> contents = find_contents();  // In the order of their first uses.
    std::map<size_t, std::vector<const Content*>> behind;   // By step, 0 = before all.
    std::map<int, const Content*> before;                   // By slot.
    for (const Content& content : contents) {
      const Content*& previous = before[content.slot];
      behind[previous ? previous->last + 1 : 0].push_back(&content);
      previous = &content;
    }
    for (size_t i = 0; i <= steps_.size(); ++i) {
      for (const Content* content : behind[i]) add_gather(*content);
      if (i < steps_.size()) schedule_.ops.push_back(std::move(steps_[i]));
    }
  }

  void add_gather(const Content& content) {
    Op op{.kind = OpKind::kGather,
          .unit = content.unit,
          .micro_batch = content.micro_batch,
          .slot = content.slot};
    op.accesses = {{BufferKind::kShard, content.unit, false, true},
                   {BufferKind::kSlot, content.slot, true, false, content.unit}};
    schedule_.ops.push_back(std::move(op));
  }

  const ScheduleInput& input_;
  const CallTree tree_;
  const bool unsharded_;
  int micro_batch_ = 0;
  std::map<int, int> last_end_;  // By unit with a backward: the call whose backward is its last.
  std::vector<Op> steps_;        // Everything but gathers.
  Schedule schedule_;
};

}  // namespace

std::vector<Call> calls_in_order(const std::vector<int>& units) {
  std::vector<Call> calls = {{}};
  for (const int unit : units) calls.push_back({.unit = unit, .parent = 0});
  return calls;
}

bool on_communication_stream(OpKind kind) {
  return kind == OpKind::kGather || kind == OpKind::kReduce;
}

bool is_collective(OpKind kind) {
  return on_communication_stream(kind) || kind == OpKind::kPacket || kind == OpKind::kFence;
}

bool is_within_shard_group(OpKind kind) {
  return kind == OpKind::kGather || kind == OpKind::kFence || kind == OpKind::kForward ||
         kind == OpKind::kBackward;
}

std::string_view op_name(OpKind kind) {
  switch (kind) {
    case OpKind::kFence:
      return "fence";
    case OpKind::kGather:
      return "gather";
    case OpKind::kForward:
      return "forward";
    case OpKind::kBackward:
      return "backward";
    case OpKind::kCollect:
      return "collect";
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
