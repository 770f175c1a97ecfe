#include "libfsdp/engine/executor.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "libfsdp/base/error.h"

namespace fsdp::engine {
namespace {

constexpr int kRoot = 0;

size_t at(int index) { return static_cast<size_t>(index); }

std::vector<size_t> segment_counts(const plan::Layout& layout) {
  std::vector<size_t> counts;
  for (const plan::Bucket& bucket : layout.buckets) counts.push_back(bucket.segments.size());
  return counts;
}

}  // namespace

Executor::Executor(plan::Layout layout, plan::Placement placement,
                   std::shared_ptr<comm::Communicator> comm, const ExecutorOptions& options)
    : comm_(std::move(comm)),
      placement_(placement),
      options_(options),
      storage_(layout, placement, *comm_, options.master),
      plans_(layout, placement, storage_.slots(), options.recompute, options.verify_plans),
      packet_(segment_counts(layout)),
      optimizers_(storage_, placement.mesh, comm_->rank(), options.optimizer, options.groups,
                  options.seed) {
  check(placement_.mesh.size() == comm_->size(), "the mesh and the communicator differ in size");
  shard_group_ = placement_.mesh.shard_group(comm_->rank());
  world_ = placement_.mesh.world();
  replica_group_ = placement_.mesh.replica_group(comm_->rank());
  contents_.resize(storage_.slots().slot_bytes.size());
  gathers_.resize(contents_.size());
  holdable_ = find_holdable();
  held_.assign(holdable_.size(), 0);
  staged_.resize(storage_.slots().stage_bytes.size());
  stage_readers_.resize(staged_.size());
  sums_in_stage_.assign(storage_.slots().gradient_stage_bytes.size(), -1);
  open_.assign(layout.units.size(), 0);
  claimed_.assign(layout.units.size(), 0);
  begun_.assign(layout.units.size(), 0);
  for (const plan::Bucket& bucket : layout.buckets)
    arrived_.emplace_back(bucket.segments.size(), uint8_t{0});
  std::vector<std::string> names;
  for (size_t unit = 0; unit < layout.units.size(); ++unit)
    names.push_back(unit == 0 ? "(root)" : layout.units[unit].name);
  comm_->name_units(names);
}

std::string Executor::where() const {
  return cat("step ", step_ + 1, ", micro-batch ", micro_batch_, " of rank ", comm_->rank());
}

std::string Executor::unit_text(int unit) const { return engine::unit_text(layout(), unit); }

// ---------------------------------------------------------------------------------------------------------------------
// Communication

bool Executor::holds(int unit) const {
  const int slot = storage_.slots().slot[at(unit)];
  if (slot < 0) return true;
  const Contents& now = contents_[at(slot)];
  return now.unit == unit && now.version == version_;
}

uint64_t Executor::begin_fetch(int unit) {
  const size_t stage = at(storage_.slots().stage[at(unit)]);
  if (is_held(unit)) return 0;
  if (staged_[stage].unit == unit && staged_[stage].version == version_) return 0;
  comm_->wait_released(stage_readers_[stage]);  // It may have been no schedule that gathered.
  uint64_t copy = 0;
  for (const int b : layout().of_unit[at(unit)]) {
    const auto bytes = static_cast<size_t>(layout().buckets[at(b)].shard_bytes());
    copy = storage_.copies()->begin(storage_.stage(b), storage_.shard(b), bytes);
  }
  staged_[stage] = {.unit = unit, .version = version_};
  return copy;
}

std::vector<uint8_t> Executor::find_holdable() const {
  std::vector<int> units(storage_.slots().slot_bytes.size());  // By slot: that lie there in turn.
  for (const int slot : storage_.slots().slot)
    if (slot >= 0) ++units[at(slot)];
  std::vector<uint8_t> holdable;
  for (const plan::Bucket& bucket : layout().buckets) {
    const int slot = storage_.slots().slot[at(bucket.unit)];
    holdable.push_back(!bucket.trainable && slot >= 0 && units[at(slot)] == 1);
  }
  return holdable;
}

bool Executor::is_held(int unit) const {
  const std::vector<int>& buckets = layout().of_unit[at(unit)];
  return std::all_of(buckets.begin(), buckets.end(), [this](int b) { return held_[at(b)] != 0; });
}

comm::Ticket Executor::begin_gather(int unit) {
  const int slot = storage_.slots().slot[at(unit)];
  const int stage = storage_.slots().stage[at(unit)];
  if (stage >= 0 && !is_held(unit)) storage_.copies()->order(begin_fetch(unit));
  if (options_.poison) poison(slot);
  comm::Ticket last;
  for (const int b : layout().of_unit[at(unit)]) {
    if (std::exchange(held_[at(b)], holdable_[at(b)])) continue;
    last = comm_->begin_gather(shard_group_, storage_.shard_source(b), storage_.gathered(b),
                               comm::make_tag("gather", step_ + 1, unit));
  }
  contents_[at(slot)] = {.unit = unit, .version = version_};
  gathers_[at(slot)] = last;
  if (stage >= 0) stage_readers_[at(stage)] = last;
  return last;
}

comm::Ticket Executor::begin_reduce(int unit) {
  comm::Ticket last;
  const bool sharded = placement_.accumulation == plan::Accumulation::kSharded;
  if (sharded && storage_.copies()) storage_.copies()->order(begin_fetch_sums(unit));
  // Not what the operation says: after a change of schedule in mid-step another one began the sum.
  const bool accumulate = sharded && std::exchange(begun_[at(unit)], uint8_t{1}) != 0;
  const int coordinate = placement_.mesh.shard_coordinate(comm_->rank());
  const bool two_level = placement_.reduction == plan::Reduction::kTwoLevel;
  const std::vector<int>& members = two_level ? shard_group_ : world_;
  for (const int b : layout().of_unit[at(unit)]) {
    const plan::Bucket& bucket = layout().buckets[at(b)];
    if (!bucket.trainable) continue;
    last = comm_->begin_fold(members, storage_.gradient_source(b), bucket.reduce_dtype,
                             coordinate * bucket.shard_numel, storage_.sums(b), accumulate,
                             comm::make_tag("reduce", step_ + 1, unit));
  }
  return last;
}

// Each replica sums a part of what the others have too.
comm::Ticket Executor::begin_reduce_outer(int unit) {
  comm::Ticket last;
  const int replica = placement_.mesh.replicate_coordinate(comm_->rank());
  for (const int b : layout().of_unit[at(unit)]) {
    const plan::Bucket& bucket = layout().buckets[at(b)];
    if (!bucket.trainable) continue;
    const int64_t part = plan::outer_part_numel(bucket, placement_.mesh);
    const comm::SymmetricSpan outer = storage_.outer_source(b);
    auto* const sums = reinterpret_cast<float*>(outer.memory->local() + outer.offset);
    last = comm_->begin_fold(replica_group_, storage_.sums_source(b), DType::kF32, replica * part,
                             {sums, static_cast<size_t>(part)}, false,
                             comm::make_tag("reduce outer", step_ + 1, unit));
  }
  return last;
}

comm::Ticket Executor::begin_gather_outer(int unit) {
  comm::Ticket last;
  for (const int b : layout().of_unit[at(unit)]) {
    if (!layout().buckets[at(b)].trainable) continue;
    const comm::SymmetricSpan sums = storage_.sums_source(b);
    last = comm_->begin_gather(replica_group_, storage_.outer_source(b),
                               sums.memory->local() + sums.offset,
                               comm::make_tag("gather outer", step_ + 1, unit));
  }
  return last;
}

uint64_t Executor::copy_sums(int unit, bool to_host) {
  uint64_t copy = 0;
  for (const int b : layout().of_unit[at(unit)]) {
    if (!layout().buckets[at(b)].trainable) continue;
    float* const host = storage_.gradient_shard(b).data();
    const std::span<float> stage = storage_.sums(b);
    copy = storage_.copies()->begin(to_host ? host : stage.data(), to_host ? stage.data() : host,
                                    stage.size_bytes());
  }
  return copy;
}

// Not what the schedule says: after a change of it in mid-step others may lie in the stage.
uint64_t Executor::begin_fetch_sums(int unit) {
  int& held = sums_in_stage_[at(storage_.slots().gradient_slot[at(unit)])];
  const bool there = std::exchange(held, unit) == unit;
  return there || !begun_[at(unit)] ? 0 : copy_sums(unit, /*to_host=*/false);
}

uint64_t Executor::begin_store_sums(int unit) { return copy_sums(unit, /*to_host=*/true); }

void Executor::fence() {
  if (placement_.home != plan::Home::kShared) return;
  comm_->finish(comm_->begin_fence(shard_group_, comm::make_tag("fence", step_ + 1)));
}

void Executor::publish() {
  if (in_step_) throw ConfigError("parameters were written inside a step: finish the step first");
  ++version_;
  std::fill(held_.begin(), held_.end(), uint8_t{0});
  fence();
}

void Executor::set_progress(int64_t steps, int64_t updates) {
  if (in_step_) throw ConfigError("a state was loaded inside a step: finish the step first");
  check(0 <= updates && updates <= steps, "more updates than steps");
  step_ = steps;
  updates_ = updates;
}

void Executor::gather_on_demand(int unit) {
  const int slot = storage_.slots().slot[at(unit)];
  if (slot < 0) return;
  if (!holds(unit)) begin_gather(unit);
  comm_->finish(gathers_[at(slot)]);
}

// Outside of steps: begins the gather of what the forward before called next, if its slot is free.
// The order of gathers stays that of the calls.
void Executor::gather_ahead() {
  const size_t here = calls_.calls().size() - 1;
  as_before_ = (here == 0 || as_before_) && here + 1 < last_forward_.size() &&
               last_forward_[here] == calls_.calls()[here];
  if (!as_before_) return;
  const int next = last_forward_[here + 1].unit;
  if (holds(next)) return;
  const int slot = storage_.slots().slot[at(next)];
  for (const int call : calls_.open())
    if (storage_.slots().slot[at(calls_.calls()[at(call)].unit)] == slot) return;
  begin_gather(next);
}

void Executor::gather_all_on_demand() {
  if (placement_.home != plan::Home::kSlot) return;
  gather_on_demand(kRoot);
  if (known_calls_.empty()) {  // The order of the modules is the best guess.
    for (int unit = 1; unit < static_cast<int>(layout().units.size()); ++unit)
      gather_on_demand(unit);
  }
  for (const plan::Call& call : known_calls_) gather_on_demand(call.unit);
}

void Executor::begin_beside(size_t index) {
  const plan::Op& op = ops()[index];
  satisfy(op);
  Begun& begun = tickets_[index];
  switch (op.kind) {
    case plan::OpKind::kFetch:
      begun.copy = begin_fetch(op.unit);
      return;
    case plan::OpKind::kGather:
      begun.ticket = begin_gather(op.unit);
      return;
    case plan::OpKind::kReduce:
      begun.ticket = begin_reduce(op.unit);
      return;
    case plan::OpKind::kReduceOuter:
      begun.ticket = begin_reduce_outer(op.unit);
      return;
    case plan::OpKind::kGatherOuter:
      begun.ticket = begin_gather_outer(op.unit);
      return;
    case plan::OpKind::kFetchSums:
      begun.copy = begin_fetch_sums(op.unit);
      return;
    case plan::OpKind::kStoreSums:
      begun.copy = begin_store_sums(op.unit);
      return;
    default:
      throw InternalError(cat("a ", plan::op_name(op.kind), " is not begun beside the model"));
  }
}

void Executor::satisfy(const plan::Op& op) {
  for (const plan::Dependency& dependency : op.after) {
    // After another schedule, or none, everything has been completed.
    if (dependency.previous_step && previous_plan_ != plan_) continue;
    const Begun& begun = dependency.previous_step ? previous_tickets_[at(dependency.op)]
                                                  : tickets_[at(dependency.op)];
    if (begun.copy != 0) {
      storage_.copies()->order(begun.copy);
    } else if (dependency.moment == plan::Moment::kReleased) {
      comm_->wait_released(begun.ticket);
    } else {
      comm_->finish(begun.ticket);
    }
  }
}

bool Executor::is_issued(const plan::Op& op) const {
  return std::all_of(op.after.begin(), op.after.end(), [this](const plan::Dependency& dependency) {
    return dependency.previous_step || at(dependency.op) < cursor_;
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The schedule

void Executor::follow(const StepPlan& plan, size_t cursor) {
  plan_ = &plan;
  scheduled_ = true;
  cursor_ = cursor;
  tickets_.assign(plan.schedule.ops.size(), {});
  previous_tickets_.resize(plan.schedule.ops.size());  // Now, so that later steps allocate nothing.
}

void Executor::leave_schedule() {
  for (const Begun& begun : tickets_) comm_->wait_released(begun.ticket);
  if (storage_.copies()) {  // The next schedule may have other units take turns in the stages.
    for (const int unit : sums_in_stage_)
      if (unit >= 0 && begun_[at(unit)]) begin_store_sums(unit);
    storage_.copies()->synchronize();
  }
  scheduled_ = false;
  previous_plan_ = nullptr;
}

// The forward of this micro-batch has been run on demand: go on behind it.
void Executor::start_schedule(int64_t trainable_tokens) {
  AgreedCalls agreed = agree_on_calls(*comm_, layout(),
                                      {.calls = calls_.calls(),
                                       .micro_batches = local_micro_batches_,
                                       .trainable_tokens = trainable_tokens},
                                      step_ + 1);
  if (expected_tokens_ == 0) expected_tokens_ = std::max<int64_t>(1, agreed.expected_tokens);
  // Units whose gradients were reduced earlier in this step stay in it to its end.
  std::vector<plan::Call> calls = std::move(agreed.calls);
  for (size_t unit = 1; unit < begun_.size(); ++unit) {
    const bool called = std::any_of(calls.begin(), calls.end(), [unit](const plan::Call& call) {
      return at(call.unit) == unit;
    });
    if (begun_[unit] && !called) calls.push_back({.unit = static_cast<int>(unit), .parent = 0});
  }
  const StepPlan& plan = plans_.find(calls, micro_batches_);
  known_calls_ = std::move(calls);
  follow(plan, plan.first_backward[at(micro_batch_)]);
}

void Executor::issue() {
  for (;;) {
    if (plan::stream_of(ops()[cursor_].kind) == plan::Stream::kCompute) return;
    begin_beside(cursor_++);
  }
}

void Executor::pass(size_t index) {
  const plan::Op& op = ops()[index];
  if (plan::stream_of(op.kind) != plan::Stream::kCompute) return begin_beside(index);
  if (op.kind == plan::OpKind::kCollect) return collect(op);
  satisfy(op);  // Left out by the model; what is ordered by it stays ordered.
}

bool Executor::reach(plan::OpKind kind, int unit) {
  const bool forward = kind == plan::OpKind::kForward;
  size_t target = cursor_;
  for (;; ++target) {
    const plan::Op& op = ops()[target];
    if (plan::stream_of(op.kind) != plan::Stream::kCompute) continue;
    if (op.micro_batch != micro_batch_ || op.kind == plan::OpKind::kPacket) return false;
    if (op.kind == kind && op.unit == unit && !op.resumed &&
        (!forward || op.in_backward == in_backward_))
      break;
    if (forward && op.kind == plan::OpKind::kBackward) return false;
  }
  while (cursor_ < target) pass(cursor_++);
  satisfy(ops()[target]);
  ++cursor_;
  return true;
}

void Executor::throw_out_of_order(int unit) const {
  throw ConfigError(cat(
      where(), ": the backward of ", unit_text(unit),
      " comes where the schedule does not have it. Hint: backward must pass every unit once for "
      "each of its calls, in the reverse order of the calls; a graph cannot be kept for a second "
      "backward."));
}

void Executor::begin_step(int64_t micro_batches) {
  if (in_step_) throw ConfigError("begin_step: the previous step has not been finished");
  if (micro_batches < 0)
    throw ConfigError(cat("begin_step: got ", micro_batches, " micro-batches"));
  const int64_t most = comm_->maximum(micro_batches, "micro-batches");
  if (most == 0) throw ConfigError("begin_step: no rank has a micro-batch");
  if (most > 1) storage_.keep_sums_apart();
  local_micro_batches_ = micro_batches;
  micro_batches_ = static_cast<int>(most);
  micro_batch_ = 0;
  packet_.begin(micro_batches, micro_batches_);
  std::fill(begun_.begin(), begun_.end(), uint8_t{0});
  std::fill(contents_.begin(), contents_.end(), Contents{});
  std::fill(staged_.begin(), staged_.end(), Contents{});
  std::fill(sums_in_stage_.begin(), sums_in_stage_.end(), -1);
  calls_.clear();
  in_step_ = true;
  complete_ = false;
  scheduled_ = false;
  comm_->report_progress(step_ + 1, "forward");
  if (!known_calls_.empty()) follow(plans_.find(known_calls_, micro_batches_), 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

void Executor::check_forward(int unit, bool graph) const {
  if (unit != kRoot && calls_.open().empty()) {
    throw ConfigError(cat(unit_text(unit),
                          " was called outside of its sharded model. Hint: call the Sharded, not "
                          "the module."));
  }
  if (unit == kRoot && !calls_.open().empty())
    throw ConfigError("the sharded model was called inside its own forward");
  if (graph && !in_step_) {
    throw ConfigError(
        "a forward with gradients outside of a step. Hint: begin_step() first, or use a "
        "NoGradGuard.");
  }
  if (in_step_ && local_micro_batches_ <= micro_batch_) {
    throw ConfigError(
        cat(where(), ": begin_step announced only ", local_micro_batches_, " micro-batches"));
  }
}

void Executor::check_still_held(int around, int unit) const {
  if (holds(around)) return;
  throw ConfigError(cat(unit_text(unit), " is called inside ", unit_text(around),
                        " and has the same slot. Hint: more slots (", storage_.slots().slots(),
                        " now), at least one for each unit in the longest chain of calls inside "
                        "each other; or make the one's module a part of the other's."));
}

void Executor::enter_forward(int unit, bool graph) {
  if (in_backward_) {  // A unit's forward, with what is inside it, is run again.
    if (!reach(plan::OpKind::kForward, unit)) throw_out_of_order(unit);
    gather_on_demand(unit);
    return;
  }
  check_forward(unit, graph);
  comm_->report_unit(unit);
  if (!in_step_ && unit == kRoot) {
    last_forward_ = calls_.calls();
    calls_.clear();
  }
  calls_.enter(unit, graph);
  try {
    if (scheduled() && !reach(plan::OpKind::kForward, unit)) leave_schedule();
    gather_on_demand(unit);
    for (const int call : calls_.open()) check_still_held(calls_.calls()[at(call)].unit, unit);
    if (!in_step_) gather_ahead();
  } catch (...) {
    calls_.leave();
    throw;
  }
}

void Executor::leave_forward() noexcept {
  if (in_backward_) return;
  calls_.leave();
  comm_->report_unit(calls_.innermost());
}

void Executor::ghost_forward() {
  if (in_step_) throw ConfigError("ghost_forward inside a step: finish the step first");
  gather_all_on_demand();
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

void Executor::start_backward(double loss_sum, int64_t trainable_tokens) {
  if (!in_step_) throw ConfigError("backward outside of a step. Hint: begin_step() first.");
  if (micro_batch_ >= local_micro_batches_) {
    throw ConfigError(
        cat(where(), ": begin_step announced only ", local_micro_batches_, " micro-batches"));
  }
  comm_->report_progress(step_ + 1, "backward");
  packet_.add_result(micro_batch_, loss_sum, trainable_tokens);
  if (!scheduled_) start_schedule(trainable_tokens);
  open_[kRoot] = 1;
  in_backward_ = true;
  backward_op_ = ops().size();
}

void Executor::enter_backward(int unit) {
  if (!in_backward_) {
    throw ConfigError(cat("backward through ", unit_text(unit),
                          " outside of Step::backward. Hint: call step.backward(loss, tokens), "
                          "not loss.backward()."));
  }
  if (!reach(plan::OpKind::kBackward, unit)) throw_out_of_order(unit);
  backward_op_ = cursor_ - 1;
  for (const plan::Access& access : ops()[backward_op_].accesses) {
    if (access.buffer == plan::BufferKind::kSlot) gather_on_demand(access.unit);
  }
  open_[at(unit)] = 1;
  comm_->report_unit(unit);
}

bool Executor::backward_reads(int unit) const {
  if (backward_op_ == ops().size()) return false;
  for (const plan::Access& access : ops()[backward_op_].accesses) {
    if (access.buffer == plan::BufferKind::kSlot && access.unit == unit) return true;
    if (access.buffer == plan::BufferKind::kShard && access.index == unit) return true;
  }
  return false;
}

void Executor::finish_backward() {
  check(reach(plan::OpKind::kBackward, kRoot), "a micro-batch does not end with the root");
  while (ops()[cursor_].kind == plan::OpKind::kCollect) collect(ops()[cursor_++]);
  open_[kRoot] = 0;
  in_backward_ = false;
  ++micro_batch_;
  calls_.clear();
  comm_->report_progress(step_ + 1, "forward");
  comm_->report_unit(-1);
  issue();  // Peers can read these gradients from now on.
}

std::byte* Executor::gradient(int unit, int bucket) {
  if (!in_backward_ || !open_[at(unit)]) {
    throw ConfigError(cat(where(), ": a gradient of ", unit_text(unit),
                          " comes outside of its backward. Hint: what a unit computes may leave it "
                          "as the result of its call only, and the model's parameters may be used "
                          "only inside the model's call."));
  }
  if (!claimed_[at(unit)]) {
    const int index = plan_->collect_of(micro_batch_, unit);
    check(index >= 0, "a gradient of a unit without a collection");
    const plan::Op& op = ops()[at(index)];
    if (!is_issued(op)) return nullptr;
    claim(op);
  }
  return storage_.gradient(bucket);
}

bool Executor::gradient_arrived(int bucket, int segment) {
  packet_.mark_used(bucket, segment);
  return !std::exchange(arrived_[at(bucket)][at(segment)], uint8_t{1});
}

void Executor::claim(const plan::Op& op) {
  if (std::exchange(claimed_[at(op.unit)], uint8_t{1})) return;
  satisfy(op);
  const bool sums = placement_.accumulation == plan::Accumulation::kUnsharded;
  if (sums && std::exchange(begun_[at(op.unit)], uint8_t{1})) return;
  for (const int b : layout().of_unit[at(op.unit)])
    std::fill(arrived_[at(b)].begin(), arrived_[at(b)].end(), uint8_t{0});
}

void Executor::collect(const plan::Op& op) {
  claim(op);
  if (open_[at(op.unit)] && collector_) collector_(op.unit);
  zero_missing_gradients(op.unit);
  claimed_[at(op.unit)] = 0;
  if (op.unit != kRoot) open_[at(op.unit)] = 0;
}

void Executor::zero_missing_gradients(int unit) {
  for (const int b : layout().of_unit[at(unit)]) {
    const plan::Bucket& bucket = layout().buckets[at(b)];
    if (!bucket.trainable) continue;
    const auto item = static_cast<int64_t>(dtype_bytes(bucket.reduce_dtype));
    std::byte* begin = storage_.gradient(b);
    int64_t clean = 0;  // Everything before this element is right.
    for (size_t s = 0; s < bucket.segments.size(); ++s) {
      if (!std::exchange(arrived_[at(b)][s], uint8_t{1})) continue;
      const plan::Segment& segment = bucket.segments[s];
      compute().zero(begin + clean * item, static_cast<size_t>((segment.begin - clean) * item));
      clean = segment.begin + segment.numel;
    }
    compute().zero(begin + clean * item, static_cast<size_t>((bucket.padded_numel - clean) * item));
  }
}

void Executor::ghost_micro_batch() {
  if (!scheduled_) {
    gather_all_on_demand();
    start_schedule(0);
  }
  for (;; ++cursor_) {
    const plan::Op& op = ops()[cursor_];
    const bool compute = plan::stream_of(op.kind) == plan::Stream::kCompute;
    if (compute && (op.micro_batch != micro_batch_ || op.kind == plan::OpKind::kPacket)) break;
    pass(cursor_);
  }
  ++micro_batch_;
}

// ---------------------------------------------------------------------------------------------------------------------
// The end of a step

void Executor::complete_gradients() {
  if (!in_step_) throw ConfigError("finish outside of a step. Hint: begin_step() first.");
  if (micro_batch_ < local_micro_batches_) {
    throw ConfigError(cat("finish after ", micro_batch_, " of the ", local_micro_batches_,
                          " micro-batches that begin_step announced"));
  }
  if (complete_) return;
  comm_->report_progress(step_ + 1, "update");
  while (micro_batch_ < micro_batches_) ghost_micro_batch();
  issue();
  check(ops()[cursor_].kind == plan::OpKind::kPacket, "the step does not end with its packet");
  satisfy(ops()[cursor_]);
  if (storage_.copies()) storage_.copies()->synchronize();  // The host goes on with the sums.
  complete_ = true;
}

StepStats Executor::agree_on_step(const PacketContents& contents) const {
  StepStats stats{.step = step_ + 1,
                  .trainable_tokens = contents.trainable_tokens,
                  .micro_batches = contents.micro_batches,
                  .non_finite = contents.sums.non_finite};
  const auto tokens = static_cast<double>(stats.trainable_tokens);
  stats.loss = tokens > 0 ? contents.loss_sum / tokens : contents.loss_sum * 0;
  return stats;
}

StepStats Executor::finish_step(const StepOptions& options, const std::function<void()>& custom) {
  const optim::ClipOptions clip{options.max_grad_norm, options.norm_type, options.clip_value};
  clip.validate();
  complete_gradients();
  const std::vector<std::byte>& message =
      packet_.write(optimizers_.sum_gradients(options.norm_type, plan_->has_gradient), plan_->hash);
  comm_->exchange(message.data(), message.size(), packet_.receive(comm_->size()),
                  comm::make_tag("step packet", step_ + 1));
  const PacketContents& contents = packet_.read(comm_->size(), rank(), step_ + 1);
  StepStats stats = agree_on_step(contents);
  ++cursor_;
  in_step_ = false;
  const double tokens = static_cast<double>(stats.trainable_tokens) * options.loss_scale;
  const optim::ClipDecision decision =
      optim::clip_decision(contents.sums, tokens > 0 ? 1.0 / tokens : 0, clip);
  stats.grad_norm = decision.grad_norm;
  if (!decision.finite || !std::isfinite(stats.loss)) {
    if (!options.skip_non_finite) throw_non_finite(stats, contents);
    stats.skipped = true;
  }
  ++step_;
  if (stats.trainable_tokens > 0 && !stats.skipped) {
    ++updates_;
    satisfy(ops()[cursor_]);
    if (custom) {
      optimizers_.scale_gradients(decision);
      custom();
      optimizers_.refresh_copies();
    } else {
      optimizers_.update(packet_, plan_->has_gradient, decision, options.learning_rate, updates_);
    }
  }
  end_step();
  return stats;
}

void Executor::throw_non_finite(const StepStats& stats, const PacketContents& contents) const {
  std::string ranks;
  for (size_t rank = 0; rank < contents.non_finite.size(); ++rank) {
    if (contents.non_finite[rank] != 0)
      ranks += cat(ranks.empty() ? "" : ", ", contents.non_finite[rank], " on rank ", rank);
  }
  throw NumericsError(cat(std::isfinite(stats.loss) ? "" : cat("the loss is ", stats.loss, " and "),
                          stats.non_finite, " elements of the gradient are not finite at step ",
                          stats.step,
                          ranks.empty() ? "" : cat(" (losses and gradient shards: ", ranks, ")"),
                          ", loss ", stats.loss, ". Nothing was updated."));
}

void Executor::end_step() {
  ++version_;
  fence();
  previous_tickets_.swap(tickets_);
  previous_plan_ = plan_;
  if (!options_.poison) return;
  for (size_t slot = 0; slot < storage_.slots().slot_bytes.size(); ++slot)
    poison(static_cast<int>(slot));
}

void Executor::poison(int slot) {
  const std::span<std::byte> memory = storage_.slot(slot);
  compute().poison(memory.data(), memory.size());
  for (size_t b = 0; b < held_.size(); ++b)
    if (storage_.slots().slot[at(layout().buckets[b].unit)] == slot) held_[b] = 0;
}

}  // namespace fsdp::engine
