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
      transfers_(storage_, placement, *comm_, options.poison),
      plans_(layout, placement, storage_.slots(), options.recompute, options.verify_plans),
      packet_(segment_counts(layout)),
      optimizers_(storage_, placement.mesh, comm_->rank(), options.optimizer, options.groups,
                  options.seed) {
  check(placement_.mesh.size() == comm_->size(), "the mesh and the communicator differ in size");
  open_.assign(layout.units.size(), 0);
  claimed_.assign(layout.units.size(), 0);
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
// Parameters outside of the schedule

void Executor::publish() {
  if (in_step_) throw ConfigError("parameters were written inside a step: finish the step first");
  transfers_.publish();
}

void Executor::set_progress(int64_t steps, int64_t updates) {
  if (in_step_) throw ConfigError("a state was loaded inside a step: finish the step first");
  check(0 <= updates && updates <= steps, "more updates than steps");
  step_ = steps;
  transfers_.set_step(step_ + 1);
  updates_ = updates;
}

// Outside of steps: begins the gather of what the forward before called next, if its slot is free.
// The order of gathers stays that of the calls.
void Executor::gather_ahead() {
  const size_t here = calls_.calls().size() - 1;
  as_before_ = (here == 0 || as_before_) && here + 1 < last_forward_.size() &&
               last_forward_[here] == calls_.calls()[here];
  if (!as_before_) return;
  const int next = last_forward_[here + 1].unit;
  if (transfers_.holds(next)) return;
  const int slot = storage_.slots().slot[at(next)];
  for (const int call : calls_.open())
    if (storage_.slots().slot[at(calls_.calls()[at(call)].unit)] == slot) return;
  transfers_.begin_gather(next);
}

void Executor::gather_all_on_demand() {
  if (placement_.home != plan::Home::kSlot) return;
  transfers_.gather_on_demand(kRoot);
  if (known_calls_.empty()) {  // The order of the modules is the best guess.
    for (int unit = 1; unit < static_cast<int>(layout().units.size()); ++unit)
      transfers_.gather_on_demand(unit);
  }
  for (const plan::Call& call : known_calls_) transfers_.gather_on_demand(call.unit);
}

void Executor::begin_beside(size_t index) {
  const plan::Op& op = ops()[index];
  satisfy(op);
  tickets_[index] = transfers_.begin(op.kind, op.unit);
}

void Executor::satisfy(const plan::Op& op) {
  for (const plan::Dependency& dependency : op.after) {
    // After another schedule, or none, everything has been completed.
    if (dependency.previous_step && previous_plan_ != plan_) continue;
    const auto& begun = dependency.previous_step ? previous_tickets_ : tickets_;
    transfers_.wait(begun[at(dependency.op)], dependency.moment);
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
  for (const UnitTransfers::Begun& begun : tickets_) comm_->wait_released(begun.ticket);
  transfers_.empty_stages();
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
  for (int unit = 1; unit < static_cast<int>(layout().units.size()); ++unit) {
    const bool called = std::any_of(calls.begin(), calls.end(),
                                    [unit](const plan::Call& call) { return call.unit == unit; });
    if (transfers_.has_sums(unit) && !called) calls.push_back({.unit = unit, .parent = 0});
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
  transfers_.begin_step();
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
  if (transfers_.holds(around)) return;
  throw ConfigError(cat(unit_text(unit), " is called inside ", unit_text(around),
                        " and has the same slot. Hint: more slots (", storage_.slots().slots(),
                        " now), at least one for each unit in the longest chain of calls inside "
                        "each other; or make the one's module a part of the other's."));
}

void Executor::enter_forward(int unit, bool graph) {
  if (in_backward_) {  // A unit's forward, with what is inside it, is run again.
    if (!reach(plan::OpKind::kForward, unit)) throw_out_of_order(unit);
    transfers_.gather_on_demand(unit);
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
    transfers_.gather_on_demand(unit);
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
    if (access.buffer == plan::BufferKind::kSlot) transfers_.gather_on_demand(access.unit);
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
  if (sums) {
    if (transfers_.has_sums(op.unit)) return;
    transfers_.begin_sums(op.unit);
  }
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
  transfers_.set_step(++step_ + 1);
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
  transfers_.parameters_changed();
  previous_tickets_.swap(tickets_);
  previous_plan_ = plan_;
  if (options_.poison) transfers_.poison_slots();
}

}  // namespace fsdp::engine
