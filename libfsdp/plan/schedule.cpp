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
  if (input.placement.offloads() && input.placement.home != Home::kSlot)
    throw ConfigError("offloaded parameters are gathered into slots: got another home");
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
        unsharded_(input.placement.accumulation == Accumulation::kUnsharded),
        two_level_(input.placement.reduction == Reduction::kTwoLevel),
        offloads_(input.placement.offloads()) {
    schedule_.mesh = input.placement.mesh;
    schedule_.reduction = input.placement.reduction;
    schedule_.stages = input.placement.stages;
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
    place(find_contents(BufferKind::kSlot), &Compiler::gather);
    place(find_contents(BufferKind::kStage), &Compiler::fetch);
    schedule_.ops = std::move(steps_);
    detail::add_dependencies(schedule_);
    return std::move(schedule_);
  }

 private:
  // What a slot or stage holds in turn: one entry for each gather or fetch that it needs.
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
    reduce_replicas_before(slot);
    const bool accumulate = !unsharded_ && micro_batch_ > 0;
    if (offloads_ && accumulate && !alone(slot)) {
      add_step(OpKind::kFetchSums, unit,
               {{BufferKind::kGradientShard, unit}, sums(unit, /*write=*/true)});
    }
    Op& reduce =
        add_step(OpKind::kReduce, unit, {{BufferKind::kGradientSlot, slot, false, true, unit}});
    reduce.scope = two_level_ ? Scope::kShardGroup : Scope::kWorld;
    reduce.accumulate = accumulate;
    if (accumulate) reduce.accesses.push_back(sums(unit, false));
    reduce.accesses.push_back(sums(unit, true));
    if (two_level_ && last) {
      outer_.push_back(unit);
    } else if (last || !alone(slot)) {
      store_sums(unit);
    }
  }

  // Whether one unit only, of those that are called, has this gradient slot: its sums stay there.
  bool alone(int gradient_slot) const {
    int units = input_.slots.gradient_slot[kRoot] == gradient_slot ? 1 : 0;
    for (const auto& [unit, call] : last_end_)
      units += input_.slots.gradient_slot[at(unit)] == gradient_slot ? 1 : 0;
    return units == 1;
  }

  // Where a reduction leaves its sums.
  Access sums(int unit, bool write) const {
    if (!offloads_) return {BufferKind::kGradientShard, unit, write};
    return {BufferKind::kGradientStage, input_.slots.gradient_slot[at(unit)], write, false, unit};
  }

  Op& add_step(OpKind kind, int unit, std::vector<Access> accesses) {
    steps_.push_back({.kind = kind,
                      .unit = unit,
                      .micro_batch = micro_batch_,
                      .gradient_slot = input_.slots.gradient_slot[at(unit)],
                      .accesses = std::move(accesses)});
    return steps_.back();
  }

  void store_sums(int unit) {
    if (!offloads_) return;
    add_step(OpKind::kStoreSums, unit,
             {sums(unit, false), {BufferKind::kGradientShard, unit, true}});
  }

  // A unit's sums of all replicas wait until other reductions have been issued, as the first of
  // them must have finished, but not until its gradient slot is needed.
  void reduce_replicas_before(int gradient_slot) {
    constexpr size_t kBehind = 2;
    for (size_t i = 0; i < outer_.size();) {
      const bool needed = input_.slots.gradient_slot[at(outer_[i])] == gradient_slot;
      if (!needed && outer_.size() <= kBehind) {
        ++i;
        continue;
      }
      reduce_replicas(outer_[i]);
      outer_.erase(outer_.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }

  void reduce_replicas(int unit) {
    Access source = sums(unit, false);
    source.by_peers = true;
    add_step(OpKind::kReduceOuter, unit, {source, {BufferKind::kOuterSlot, 0, true, false, unit}})
        .scope = Scope::kReplicas;
    add_step(OpKind::kGatherOuter, unit,
             {{BufferKind::kOuterSlot, 0, false, true, unit}, sums(unit, true)})
        .scope = Scope::kReplicas;
    store_sums(unit);
  }

  void finish_step() {
    micro_batch_ = input_.micro_batches - 1;
    for (const int unit : outer_) reduce_replicas(unit);
    Op packet{
        .kind = OpKind::kPacket, .scope = Scope::kWorld, .micro_batch = input_.micro_batches - 1};
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

  // The contents of every slot, or stage, over the whole step, so that it can be filled at the last
  // use of what lies there before, however far away the first use is. In the order of first uses.
  std::vector<Content> find_contents(BufferKind buffer) const {
    std::vector<Content> contents;
    std::map<int, size_t> current;  // By slot.
    for (size_t i = 0; i < steps_.size(); ++i) {
      for (const Access& access : steps_[i].accesses) {
        if (access.buffer != buffer || access.write) continue;
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

  void place(const std::vector<Content>& contents, Op (Compiler::*fill)(const Content&) const) {
    std::map<size_t, std::vector<const Content*>> behind;  // By step, 0 = before all.
    std::map<int, const Content*> before;                  // By slot.
    for (const Content& content : contents) {
      const Content*& previous = before[content.slot];
      behind[previous ? previous->last + 1 : 0].push_back(&content);
      previous = &content;
    }
    std::vector<Op> placed;
    for (size_t i = 0; i <= steps_.size(); ++i) {
      for (const Content* content : behind[i]) placed.push_back((this->*fill)(*content));
      if (i < steps_.size()) placed.push_back(std::move(steps_[i]));
    }
    steps_ = std::move(placed);
  }

  Op gather(const Content& content) const {
    Op op{.kind = OpKind::kGather,
          .unit = content.unit,
          .micro_batch = content.micro_batch,
          .slot = content.slot};
    if (offloads_) op.stage = input_.slots.stage[at(content.unit)];
    op.accesses = {{BufferKind::kShard, content.unit, false, true},
                   {BufferKind::kSlot, content.slot, true, false, content.unit}};
    if (offloads_) op.accesses[0] = {BufferKind::kStage, op.stage, false, true, content.unit};
    return op;
  }

  Op fetch(const Content& content) const {
    return {.kind = OpKind::kFetch,
            .unit = content.unit,
            .micro_batch = content.micro_batch,
            .stage = content.slot,
            .accesses = {{BufferKind::kShard, content.unit},
                         {BufferKind::kStage, content.slot, true, false, content.unit}}};
  }

  const ScheduleInput& input_;
  const CallTree tree_;
  const bool unsharded_;
  const bool two_level_;
  const bool offloads_;
  int micro_batch_ = 0;
  std::map<int, int> last_end_;  // By unit with a backward: the call whose backward is its last.
  std::vector<int> outer_;       // Units whose sums of all replicas are still to be made.
  std::vector<Op> steps_;        // At first everything but gathers and fetches.
  Schedule schedule_;
};

}  // namespace

std::vector<Call> calls_in_order(const std::vector<int>& units) {
  std::vector<Call> calls = {{}};
  for (const int unit : units) calls.push_back({.unit = unit, .parent = 0});
  return calls;
}

Stream stream_of(OpKind kind) {
  switch (kind) {
    case OpKind::kGather:
    case OpKind::kReduce:
    case OpKind::kReduceOuter:
    case OpKind::kGatherOuter:
      return Stream::kCommunication;
    case OpKind::kFetch:
    case OpKind::kFetchSums:
    case OpKind::kStoreSums:
      return Stream::kCopy;
    default:
      return Stream::kCompute;
  }
}

bool is_collective(OpKind kind) {
  return stream_of(kind) == Stream::kCommunication || kind == OpKind::kPacket ||
         kind == OpKind::kFence;
}

std::string_view op_name(OpKind kind) {
  switch (kind) {
    case OpKind::kFence:
      return "fence";
    case OpKind::kFetch:
      return "fetch";
    case OpKind::kGather:
      return "gather";
    case OpKind::kForward:
      return "forward";
    case OpKind::kBackward:
      return "backward";
    case OpKind::kCollect:
      return "collect";
    case OpKind::kFetchSums:
      return "fetch sums";
    case OpKind::kReduce:
      return "reduce";
    case OpKind::kReduceOuter:
      return "reduce outer";
    case OpKind::kGatherOuter:
      return "gather outer";
    case OpKind::kStoreSums:
      return "store sums";
    case OpKind::kPacket:
      return "packet";
    case OpKind::kOptimizer:
      return "optimizer";
  }
  throw InternalError("unknown kind of operation");
}

std::string_view buffer_name(BufferKind buffer) {
  switch (buffer) {
    case BufferKind::kShard:
      return "shard of unit";
    case BufferKind::kStage:
      return "stage";
    case BufferKind::kSlot:
      return "slot";
    case BufferKind::kGradientSlot:
      return "gradient slot";
    case BufferKind::kGradientStage:
      return "gradient stage";
    case BufferKind::kOuterSlot:
      return "outer slot";
    case BufferKind::kGradientShard:
      return "gradient shard of unit";
  }
  throw InternalError("unknown kind of buffer");
}

Schedule compile(const ScheduleInput& input) {
  validate(input);
  return Compiler(input).run();
}

}  // namespace fsdp::plan
