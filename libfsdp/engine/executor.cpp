#include "libfsdp/engine/executor.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "libfsdp/base/error.h"

namespace fsdp::engine {
namespace {

constexpr int kNotCalled = -2;

size_t at(int index) { return static_cast<size_t>(index); }

void poison(std::span<std::byte> memory) { device::poison(memory.data(), memory.size()); }

}  // namespace

Executor::Executor(plan::Layout layout, plan::Placement placement,
                   std::shared_ptr<comm::Communicator> comm, const ExecutorOptions& options)
    : comm_(std::move(comm)),
      placement_(placement),
      options_(options),
      storage_(layout, placement, *comm_) {
  check(placement_.mesh.size() == comm_->size(), "the mesh and the communicator differ in size");
  shard_group_ = placement_.mesh.shard_group(comm_->rank());
  world_ = placement_.mesh.world();
  slot_of_unit_.assign(layout.units.size(),
                       placement_.home == plan::Home::kResident ? -1 : kNotCalled);
  if (placement_.home == plan::Home::kSlot) slot_of_unit_[0] = placement_.slots;
  contents_.resize(at(placement_.slots + 1));
  for (const plan::Bucket& bucket : layout.buckets) {
    arrived_.emplace_back(bucket.segments.size(), uint8_t{0});
    used_.emplace_back(bucket.segments.size(), uint8_t{0});
    optimizers_.push_back(
        bucket.trainable ? optim::make_optimizer(options.optimizer, bucket.shard_numel) : nullptr);
  }
  slices_ = plan::slices_of(layout, placement_.mesh.shard_coordinate(comm_->rank()));
  segments_.reserve(slices_.size());
}

std::string Executor::where() const {
  return cat("step ", step_ + 1, ", micro-batch ", micro_batch_, " of rank ", comm_->rank());
}

int Executor::slot_of(int unit) {
  int& slot = slot_of_unit_[at(unit)];
  if (slot == kNotCalled) {
    slot = plan::slot_of_call(static_cast<int>(order_.size()), placement_.slots);
    order_.push_back(unit);
  } else if (placement_.home == plan::Home::kResident && unit != 0 &&
             std::find(order_.begin(), order_.end(), unit) == order_.end()) {
    order_.push_back(unit);
  }
  return slot;
}

// ---------------------------------------------------------------------------------------------------------------------
// Communication

comm::Ticket Executor::begin_gather(int unit, int slot) {
  if (options_.poison) poison(storage_.slot(slot));
  comm::Ticket last;
  for (const int b : layout().of_unit[at(unit)]) {
    last = comm_->begin_gather(shard_group_, storage_.shard_source(b), storage_.gathered(slot, b),
                               comm::make_tag("gather", step_ + 1, unit));
  }
  contents_[at(slot)] = {.unit = unit, .version = version_};
  return last;
}

comm::Ticket Executor::begin_reduce(const plan::Op& op) {
  comm::Ticket last;
  const int coordinate = placement_.mesh.shard_coordinate(comm_->rank());
  for (const int b : layout().of_unit[at(op.unit)]) {
    const plan::Bucket& bucket = layout().buckets[at(b)];
    if (!bucket.trainable) continue;
    last = comm_->begin_fold(world_, storage_.gradient_source(op.gradient_slot, b), bucket.dtype,
                             coordinate * bucket.shard_numel, storage_.gradient_shard(b),
                             op.accumulate, comm::make_tag("reduce", step_ + 1, op.unit));
  }
  return last;
}

void Executor::gather_on_demand(int unit) {
  const int slot = slot_of(unit);
  if (slot < 0 || layout().of_unit[at(unit)].empty()) return;
  const Contents& now = contents_[at(slot)];
  if (now.unit == unit && now.version == version_) return;
  comm_->finish(begin_gather(unit, slot));
}

void Executor::begin_communication(size_t index) {
  const plan::Op& op = schedule_->ops[index];
  satisfy(op);
  tickets_[index] =
      op.kind == plan::OpKind::kGather ? begin_gather(op.unit, op.slot) : begin_reduce(op);
}

void Executor::satisfy(const plan::Op& op) {
  for (const plan::Dependency& dependency : op.after) {
    // In the first steps the previous schedule is another one, or none: the packet has ordered
    // everything before it.
    if (dependency.previous_step && previous_schedule_ != schedule_) continue;
    const comm::Ticket ticket = dependency.previous_step ? previous_tickets_[at(dependency.op)]
                                                         : tickets_[at(dependency.op)];
    if (dependency.moment == plan::Moment::kReleased) {
      comm_->wait_released(ticket);
    } else {
      comm_->finish(ticket);
    }
  }
}

void Executor::issue_communication() {
  while (plan::on_communication_stream(schedule_->ops[cursor_].kind))
    begin_communication(cursor_++);
}

void Executor::advance() {
  issue_communication();
  satisfy(schedule_->ops[cursor_]);
}

void Executor::gather_all_on_demand() {
  gather_on_demand(0);
  for (const int unit : call_order()) gather_on_demand(unit);
}

// ---------------------------------------------------------------------------------------------------------------------
// The schedule

std::vector<int> Executor::call_order() const {
  std::vector<int> order = order_;
  for (int unit = 1; unit < static_cast<int>(layout().units.size()); ++unit) {
    if (std::find(order.begin(), order.end(), unit) == order.end()) order.push_back(unit);
  }
  return order;
}

void Executor::compile_schedule() {
  auto found = schedules_.find(micro_batches_);
  if (found == schedules_.end()) {
    const std::vector<int> order = call_order();
    for (const int unit : order) slot_of(unit);  // Units that were never called come last.
    plan::ScheduleInput input{.forward_order = order,
                              .trainable = {},
                              .has_params = {},
                              .micro_batches = micro_batches_,
                              .placement = placement_};
    for (size_t unit = 0; unit < layout().units.size(); ++unit) {
      input.trainable.push_back(layout().trainable_numel(static_cast<int>(unit)) > 0);
      input.has_params.push_back(!layout().of_unit[unit].empty());
    }
    found = schedules_.emplace(micro_batches_, plan::compile(input)).first;
  }
  schedule_ = &found->second;
  schedule_hash_ = schedule_->hash();
  tickets_.assign(schedule_->ops.size(), {});
  previous_tickets_.resize(schedule_->ops.size());  // Now, so that later steps allocate nothing.
  cursor_ = 0;
}

// The forward of the first micro-batch has been run on demand: go on behind it.
void Executor::compile_behind_first_forward() {
  compile_schedule();
  while (schedule_->ops[cursor_].kind != plan::OpKind::kBackward) ++cursor_;
}

void Executor::reach(plan::OpKind kind, int unit) {
  const auto is_target = [&](const plan::Op& op) {
    return op.kind == kind && op.unit == unit && op.micro_batch == micro_batch_;
  };
  const auto ahead = std::find_if(schedule_->ops.begin() + static_cast<std::ptrdiff_t>(cursor_),
                                  schedule_->ops.end(), is_target);
  for (advance(); !is_target(schedule_->ops[cursor_]); ++cursor_, advance()) {
    const plan::Op& op = schedule_->ops[cursor_];
    const bool may_skip = op.kind == kind && op.unit != 0 && op.micro_batch == micro_batch_;
    if (ahead == schedule_->ops.end() || !may_skip) throw_out_of_order(kind, unit, op);
    if (kind == plan::OpKind::kBackward) skip_backward(op);
  }
}

void Executor::throw_out_of_order(plan::OpKind kind, int unit, const plan::Op& expected) const {
  const auto name = [this](int u) {
    return u == 0 ? "the root" : cat("unit '", layout().units[at(u)].name, "'");
  };
  throw ConfigError(
      cat(where(), ": the ", plan::op_name(kind), " of ", name(unit),
          " comes where the schedule has the ", plan::op_name(expected.kind),
          expected.unit >= 0 ? cat(" of ", name(expected.unit)) : "",
          ". Hint: every micro-batch calls the model once, and its units in the order of the first "
          "micro-batch, each at most once."));
}

void Executor::begin_step(int64_t micro_batches) {
  if (in_step_) throw ConfigError("begin_step: the previous step has not been finished");
  if (micro_batches < 0)
    throw ConfigError(cat("begin_step: got ", micro_batches, " micro-batches"));
  const int64_t most = comm_->maximum(micro_batches, "micro-batches");
  if (most == 0) throw ConfigError("begin_step: no rank has a micro-batch");
  local_micro_batches_ = micro_batches;
  micro_batches_ = static_cast<int>(most);
  micro_batch_ = 0;
  results_.assign(at(micro_batches_), {});
  for (auto& flags : used_) std::fill(flags.begin(), flags.end(), uint8_t{0});
  in_step_ = true;
  comm_->report_progress(step_ + 1, "forward");
  schedule_ = nullptr;
  const bool order_known = order_.size() + 1 == layout().units.size();
  if (order_known) compile_schedule();
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

void Executor::enter_forward(int unit, bool graph) {
  const auto& units = layout().units;
  if (unit != 0 && active_forward_ != 0) {
    throw ConfigError(active_forward_ < 0
                          ? cat("unit '", units[at(unit)].name,
                                "' was called outside of its sharded model. Hint: call the "
                                "Sharded, not the module.")
                          : cat("unit '", units[at(unit)].name, "' was called inside unit '",
                                units[at(active_forward_)].name,
                                "': nested units are not supported"));
  }
  if (unit == 0 && active_forward_ >= 0)
    throw ConfigError("the sharded model was called inside its own forward");
  if (graph && !in_step_) {
    throw ConfigError(
        "a forward with gradients outside of a step. Hint: begin_step() first, or use a "
        "NoGradGuard.");
  }
  if (graph && local_micro_batches_ <= micro_batch_) {
    throw ConfigError(
        cat(where(), ": begin_step announced only ", local_micro_batches_, " micro-batches"));
  }
  if (!graph && in_step_)
    throw ConfigError("a forward without gradients inside a step: finish the step first");
  slot_of(unit);
  if (scheduled()) {
    reach(plan::OpKind::kForward, unit);
    ++cursor_;
  } else {
    gather_on_demand(unit);
  }
  active_forward_ = unit;
}

void Executor::leave_forward(int unit) noexcept { active_forward_ = unit == 0 ? -1 : 0; }

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
  results_[at(micro_batch_)] = {.loss_sum = loss_sum, .trainable_tokens = trainable_tokens};
  if (!schedule_) compile_behind_first_forward();
  for (auto& flags : arrived_) std::fill(flags.begin(), flags.end(), uint8_t{0});
  advance();
  // Units that the model left out of this forward are left out of its backward too: reach() skips
  // both.
  while (schedule_->ops[cursor_].kind == plan::OpKind::kForward &&
         schedule_->ops[cursor_].unit != 0) {
    ++cursor_;
    advance();
  }
  in_backward_ = true;
}

void Executor::enter_backward(int unit) {
  if (!in_backward_) {
    throw ConfigError(cat("backward through unit '", layout().units[at(unit)].name,
                          "' outside of Step::backward. Hint: call step.backward(loss, tokens), "
                          "not loss.backward()."));
  }
  leave_backward();
  reach(plan::OpKind::kBackward, unit);
  ++cursor_;
  active_backward_ = unit;
}

void Executor::leave_backward() {
  if (active_backward_ < 0) return;
  const plan::Op& op = schedule_->ops[cursor_ - 1];
  check(op.kind == plan::OpKind::kBackward && op.unit == active_backward_,
        "cursor left a unit's backward");
  zero_missing_gradients(active_backward_, op.gradient_slot);
  active_backward_ = -1;
}

void Executor::skip_backward(const plan::Op& op) {
  zero_missing_gradients(op.unit, op.gradient_slot);
}

void Executor::finish_backward() {
  leave_backward();
  reach(plan::OpKind::kBackward, 0);
  zero_missing_gradients(0, schedule_->ops[cursor_].gradient_slot);
  ++cursor_;
  in_backward_ = false;
  ++micro_batch_;
  comm_->report_progress(step_ + 1, "forward");
  issue_communication();  // Peers can read these gradients from now on.
}

std::byte* Executor::gradient(int unit, int bucket) {
  int slot = placement_.gradient_slots;
  if (unit != 0) {
    check(active_backward_ == unit, "a gradient arrived outside of its unit's backward");
    slot = schedule_->ops[cursor_ - 1].gradient_slot;
  }
  return storage_.gradient(slot, bucket);
}

bool Executor::gradient_arrived(int bucket, int segment) {
  used_[at(bucket)][at(segment)] = 1;
  return !std::exchange(arrived_[at(bucket)][at(segment)], uint8_t{1});
}

void Executor::zero_missing_gradients(int unit, int gradient_slot) {
  for (const int b : layout().of_unit[at(unit)]) {
    const plan::Bucket& bucket = layout().buckets[at(b)];
    if (!bucket.trainable) continue;
    const auto item = static_cast<int64_t>(dtype_bytes(bucket.dtype));
    std::byte* begin = storage_.gradient(gradient_slot, b);
    int64_t clean = 0;  // Everything before this element is right.
    for (size_t s = 0; s < bucket.segments.size(); ++s) {
      if (!arrived_[at(b)][s]) continue;
      const plan::Segment& segment = bucket.segments[s];
      std::memset(begin + clean * item, 0, static_cast<size_t>((segment.begin - clean) * item));
      clean = segment.begin + segment.numel;
    }
    std::memset(begin + clean * item, 0, static_cast<size_t>((bucket.padded_numel - clean) * item));
  }
}

void Executor::ghost_micro_batch() {
  if (!schedule_) {
    gather_all_on_demand();
    compile_behind_first_forward();
  }
  for (auto& flags : arrived_) std::fill(flags.begin(), flags.end(), uint8_t{0});
  for (;;) {
    advance();
    const plan::Op& op = schedule_->ops[cursor_];
    if (op.micro_batch != micro_batch_ || op.kind == plan::OpKind::kPacket) break;
    if (op.kind == plan::OpKind::kBackward) skip_backward(op);
    ++cursor_;
  }
  ++micro_batch_;
}

// ---------------------------------------------------------------------------------------------------------------------
// The end of a step

namespace {

struct PacketHead {
  int64_t micro_batches = 0;
  uint64_t schedule_hash = 0;
  int64_t non_finite = 0;
  kernels::ExactSum::Limbs limbs{};
};

}  // namespace

void Executor::make_packet() {
  PacketHead head{.micro_batches = local_micro_batches_, .schedule_hash = schedule_hash_};
  kernels::SquareSum squares;
  // Replicas hold equal sums: each element counts once, on the first replica.
  if (placement_.mesh.replicate_coordinate(comm_->rank()) == 0) {
    for (size_t b = 0; b < layout().buckets.size(); ++b) {
      const std::span<const float> gradient = storage_.gradient_shard(static_cast<int>(b));
      kernels::add_square_sums(gradient.data(), static_cast<int64_t>(gradient.size()), squares);
    }
  }
  head.non_finite = squares.non_finite;
  head.limbs = squares.sum.limbs();
  packet_.clear();
  const auto append = [this](const void* data, size_t bytes) {
    const auto* begin = static_cast<const std::byte*>(data);
    packet_.insert(packet_.end(), begin, begin + bytes);
  };
  append(&head, sizeof head);
  append(results_.data(), results_.size() * sizeof(MicroBatchResult));
  for (const auto& flags : used_) append(flags.data(), flags.size());
}

StepStats Executor::read_packets(kernels::SquareSum& squares) {
  StepStats stats{.step = step_ + 1};
  kernels::ExactSum::Limbs limbs{};
  const auto ranks = at(comm_->size());
  global_results_.resize(results_.size() * ranks);
  for (size_t rank = 0; rank < ranks; ++rank) {
    const std::byte* packet = packets_.data() + packet_.size() * rank;
    PacketHead head;
    std::memcpy(&head, packet, sizeof head);
    packet += sizeof head;
    if (head.schedule_hash != schedule_hash_) {
      throw CommError(cat("rank ", rank, " runs another schedule than rank ", comm_->rank(),
                          " at step ", step_ + 1,
                          ": their models call their units in different orders"));
    }
    stats.micro_batches += head.micro_batches;
    squares.non_finite += head.non_finite;
    for (size_t i = 0; i < limbs.size(); ++i) limbs[i] += head.limbs[i];
    for (size_t a = 0; a < results_.size(); ++a, packet += sizeof(MicroBatchResult)) {
      std::memcpy(&global_results_[a * ranks + rank], packet, sizeof(MicroBatchResult));
    }
    for (auto& flags : used_) {
      for (uint8_t& flag : flags) flag |= static_cast<uint8_t>(*packet++);
    }
  }
  squares.sum = kernels::ExactSum::from_limbs(limbs);
  double loss_sum = 0;
  for (const MicroBatchResult& result : global_results_) {  // In the order of a * ranks + rank.
    loss_sum += result.loss_sum;
    stats.trainable_tokens += result.trainable_tokens;
  }
  const auto tokens = static_cast<double>(stats.trainable_tokens);
  stats.loss = tokens > 0 ? loss_sum / tokens : loss_sum * 0;
  return stats;
}

void Executor::update(const StepStats& stats, const optim::ClipDecision& decision,
                      double learning_rate) {
  const optim::UpdateScalars scalars{.learning_rate = learning_rate,
                                     .step = stats.step,
                                     .gradient_scale = decision.gradient_scale};
  for (size_t b = 0; b < layout().buckets.size(); ++b) {
    const plan::Bucket& bucket = layout().buckets[b];
    if (!bucket.trainable) continue;
    segments_.clear();
    for (const plan::ShardSlice& slice : slices_) {
      // A parameter that no rank used in this step is left as it is.
      if (at(slice.bucket) != b || !used_[b][at(slice.segment)]) continue;
      segments_.push_back(
          {.begin = slice.shard_at,
           .end = slice.shard_at + slice.numel,
           .group = layout().param(bucket, bucket.segments[at(slice.segment)]).group});
    }
    const int index = static_cast<int>(b);
    std::byte* shard = storage_.shard(index);
    const bool split = storage_.remainder(index) != nullptr;
    optimizers_[b]->update({.master = split ? nullptr : reinterpret_cast<float*>(shard),
                            .high = split ? reinterpret_cast<uint16_t*>(shard) : nullptr,
                            .remainder = storage_.remainder(index),
                            .gradient = storage_.gradient_shard(index).data(),
                            .numel = bucket.shard_numel,
                            .segments = segments_,
                            .groups = options_.groups},
                           scalars);
  }
}

StepStats Executor::finish_step(const StepOptions& options) {
  if (!in_step_) throw ConfigError("finish outside of a step. Hint: begin_step() first.");
  if (micro_batch_ < local_micro_batches_) {
    throw ConfigError(cat("finish after ", micro_batch_, " of the ", local_micro_batches_,
                          " micro-batches that begin_step announced"));
  }
  comm_->report_progress(step_ + 1, "update");
  while (micro_batch_ < micro_batches_) ghost_micro_batch();
  advance();
  check(schedule_->ops[cursor_].kind == plan::OpKind::kPacket,
        "the step does not end with its packet");
  make_packet();
  packets_.resize(packet_.size() * at(comm_->size()));
  comm_->exchange(packet_.data(), packet_.size(), packets_.data(),
                  comm::make_tag("step packet", step_ + 1));
  kernels::SquareSum squares;
  StepStats stats = read_packets(squares);
  ++cursor_;
  in_step_ = false;
  if (!std::isfinite(stats.loss))
    throw NumericsError(cat("the loss is ", stats.loss, " at step ", stats.step));
  const double inverse_tokens =
      stats.trainable_tokens > 0 ? 1.0 / static_cast<double>(stats.trainable_tokens) : 0;
  const optim::ClipDecision decision =
      optim::clip_decision(squares, inverse_tokens, options.max_grad_norm);
  stats.grad_norm = decision.grad_norm;
  if (!decision.finite) {
    throw NumericsError(cat(squares.non_finite, " elements of the gradient are not finite at step ",
                            stats.step, " (loss ", stats.loss, "). Nothing was updated."));
  }
  advance();
  ++step_;
  if (stats.trainable_tokens > 0) update(stats, decision, options.learning_rate);
  ++version_;
  previous_tickets_.swap(tickets_);
  previous_schedule_ = schedule_;
  if (options_.poison && placement_.home == plan::Home::kSlot) {
    for (int slot = 0; slot <= placement_.slots; ++slot) poison(storage_.slot(slot));
  }
  return stats;
}

}  // namespace fsdp::engine
