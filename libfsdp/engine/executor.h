// Runs a compiled schedule on one rank: the model's calls are its compute operations, everything
// else is done here.
//
// The caller (fsdp::shard) tells where the model is: enter/leave of units in forward,
// start/enter/finish of backward. The executor issues the communication that stands before that
// point, and waits for what the point depends on. Torch-free.
//
// Note [On demand]
// The order of calls is not known before the model has run once. Until then units are gathered on
// demand. When the micro-batch's backward starts the ranks compare what they have called, and the
// schedule for it is compiled (or found). A call that the schedule does not hold ends it: what is
// under way is completed, the rest of the forward runs on demand, and at the backward the ranks
// agree on a new schedule. All ranks do so at the same call, or a tag differs and is an error. A
// model may leave out calls that the schedule holds, on each rank others. Forwards outside of a
// step (evaluation) always run on demand; what the forward before called next is on its way
// already.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/engine/call_agreement.h"
#include "libfsdp/engine/call_record.h"
#include "libfsdp/engine/shard_optimizers.h"
#include "libfsdp/engine/step_packet.h"
#include "libfsdp/engine/step_plans.h"
#include "libfsdp/engine/storage.h"
#include "libfsdp/engine/unit_transfers.h"
#include "libfsdp/optim/clip.h"
#include "libfsdp/optim/optimizer.h"

namespace fsdp::engine {

struct ExecutorOptions {
  bool poison = false;        ///< Fill a slot with NaN when its contents end: for tests.
  bool verify_plans = false;  ///< Look for races in every plan that is compiled.
  bool recompute = false;     ///< The model runs its units' forwards again in backward.
  MasterPrecision master = MasterPrecision::kSplit;
  uint64_t seed = 0;  ///< Of stochastic rounding.
  optim::OptimizerOptions optimizer;
  std::vector<optim::ParamGroup> groups;  ///< ParamSpec::group is an index into these.
};

/// What a step did, equal on all ranks.
struct StepStats {
  int64_t step = 0;  ///< 1 for the first.
  double loss = 0;   ///< Sum of token losses / trainable tokens, over all ranks and micro-batches.
  double grad_norm = 0;          ///< Of that loss's gradient, before clipping.
  int64_t trainable_tokens = 0;  ///< Over all ranks.
  int64_t micro_batches = 0;     ///< Over all ranks, ghosts not counted.
  int64_t non_finite = 0;        ///< Elements of the gradient that are infinite or NaN.
  bool skipped = false;          ///< Nothing was updated: see StepOptions::skip_non_finite.
};

struct StepOptions {
  double learning_rate = 0;
  double max_grad_norm = 0;  ///< 0 = no clipping by norm.
  optim::NormType norm_type = optim::NormType::kTwo;
  double clip_value = 0;         ///< Largest magnitude of the gradient's elements; 0 = no limit.
  double loss_scale = 1;         ///< The losses were multiplied by it before backward.
  bool skip_non_finite = false;  ///< Leave the update out, instead of NumericsError.
};

class Executor {
 public:
  /// Collective over comm's world. `layout.mesh` has comm's size.
  Executor(plan::Layout layout, plan::Placement placement, std::shared_ptr<comm::Communicator> comm,
           const ExecutorOptions& options);

  kernels::Compute& compute() const { return storage_.compute(); }
  Storage& storage() { return storage_; }
  const Storage& storage() const { return storage_; }
  const plan::Layout& layout() const { return storage_.layout(); }
  const plan::Placement& placement() const { return placement_; }
  comm::Communicator& comm() { return *comm_; }
  int rank() const { return comm_->rank(); }
  /// Of a trainable bucket.
  optim::ShardOptimizer& optimizer(int bucket) { return optimizers_.of(bucket); }
  /// Steps done, and those of them that updated something.
  int64_t step() const { return step_; }
  int64_t updates() const { return updates_; }
  /// As if so many steps had been done, and so many of them had updated something: after a load.
  /// Equal on all ranks. Throws ConfigError inside a step.
  void set_progress(int64_t steps, int64_t updates);
  /// About the trainable tokens of the first step that this executor made, over all ranks; equal on
  /// all ranks, and at any number of ranks. Known from that step's first start_backward() on, and
  /// after complete_gradients() on ranks without data; 0 before.
  int64_t expected_tokens() const { return expected_tokens_; }
  /// The micro-batch of this rank that is under way.
  int64_t micro_batch() const { return micro_batch_; }
  /// The plan of the current step, or of the last; null before the first backward.
  const StepPlan* plan() const { return plan_; }

  /// Called at the end of a unit's last backward of a micro-batch: hand over (gradient()) what was
  /// not taken when it came.
  void set_collector(std::function<void(int unit)> collector) { collector_ = std::move(collector); }

  /// Collective: makes what store() wrote visible to all ranks.
  void publish();

  /// Collective. `micro_batches` of this rank (0 is legal); ranks may differ. Throws ConfigError
  /// inside a step.
  void begin_step(int64_t micro_batches);
  bool in_step() const { return in_step_; }

  /// Around a unit's forward; unit 0 (the root) surrounds the whole model. `graph`: gradients are
  /// recorded. Also in backward, for units inside one that runs its forward again.
  void enter_forward(int unit, bool graph);
  void leave_forward() noexcept;
  /// Whether a call of `unit` is under way.
  bool in_forward(int unit) const { return calls_.is_open(unit); }

  /// Around the backward of one micro-batch.
  void start_backward(double loss_sum, int64_t trainable_tokens);
  void enter_backward(int unit);
  void finish_backward();
  bool in_backward() const { return in_backward_; }
  /// Whether the backward that was entered last needs the parameters of `unit`.
  bool backward_reads(int unit) const;
  /// Where the unit's gradient of this micro-batch goes; null when its slot is still in use: keep
  /// it until the collector is called. Throws ConfigError outside of the unit's backward.
  std::byte* gradient(int unit, int bucket);
  /// Notes a gradient (bucket, segment of the bucket) whose place gradient() gave; returns whether
  /// it replaces what lies there (else it is to be added).
  bool gradient_arrived(int bucket, int segment);

  /// Joins the collectives of a forward without gradients, without a model call: for ranks without
  /// data.
  void ghost_forward();

  /// Collective. Joins with ghost micro-batches when other ranks had more; then every rank's
  /// gradient shards hold the sums over all ranks and micro-batches. finish_step() does it.
  void complete_gradients();
  bool gradients_complete() const { return in_step_ && complete_; }

  /// Collective. Agrees on loss and norm, updates: with the optimizer, or with `update`, which
  /// finds gradients of the mean loss, clipped, in the gradient shards. Throws NumericsError on all
  /// ranks, without an update, when a loss or a gradient is not finite.
  StepStats finish_step(const StepOptions& options, const std::function<void()>& update = {});

 private:
  bool scheduled() const { return in_step_ && scheduled_; }
  const std::vector<plan::Op>& ops() const { return plan_->schedule.ops; }
  void follow(const StepPlan& plan, size_t cursor);
  void leave_schedule();
  void start_schedule(int64_t trainable_tokens);
  std::string unit_text(int unit) const;

  void gather_all_on_demand();
  void gather_ahead();
  /// What the plan has on the streams of communication and copies.
  void begin_beside(size_t index);
  bool is_issued(const plan::Op& op) const;
  void satisfy(const plan::Op& op);
  /// Issues and does what stands before the next thing that the model does.
  void issue();
  /// Passes an operation that the model leaves out, or that is not the model's.
  void pass(size_t index);
  /// Brings the cursor behind the given compute operation of this micro-batch, passing what the
  /// model left out; false when the schedule does not hold it.
  bool reach(plan::OpKind kind, int unit);
  [[noreturn]] void throw_out_of_order(int unit) const;
  void check_forward(int unit, bool graph) const;
  void check_still_held(int around, int unit) const;

  void claim(const plan::Op& collect);
  void collect(const plan::Op& op);
  void zero_missing_gradients(int unit);
  void ghost_micro_batch();
  std::string where() const;

  StepStats agree_on_step(const PacketContents& contents) const;
  [[noreturn]] void throw_non_finite(const StepStats& stats, const PacketContents& contents) const;
  void end_step();

  std::shared_ptr<comm::Communicator> comm_;
  plan::Placement placement_;
  ExecutorOptions options_;
  Storage storage_;
  UnitTransfers transfers_;
  StepPlans plans_;
  std::function<void(int)> collector_;

  std::vector<plan::Call> known_calls_;   // Of a micro-batch, as last seen.
  std::vector<plan::Call> last_forward_;  // Calls of the last one outside of a step.
  bool as_before_ = false;                // This one has called the same so far.

  // The current step.
  bool in_step_ = false;
  bool in_backward_ = false;
  bool scheduled_ = false;
  bool complete_ = false;
  int64_t step_ = 0;
  int64_t updates_ = 0;
  int64_t expected_tokens_ = 0;
  int64_t local_micro_batches_ = 0;
  int micro_batches_ = 0;  // Of the rank that has most.
  int micro_batch_ = 0;
  const StepPlan* plan_ = nullptr;
  const StepPlan* previous_plan_ = nullptr;  // Of the step before, if it was followed to its end.
  size_t cursor_ = 0;
  size_t backward_op_ = 0;                              // That was entered last.
  std::vector<UnitTransfers::Begun> tickets_;           // By operation.
  std::vector<UnitTransfers::Begun> previous_tickets_;  // Of the step before.
  CallRecord calls_;                                    // Of the micro-batch under way.
  StepPacket packet_;
  ShardOptimizers optimizers_;
  std::vector<uint8_t> open_;                  // By unit: its backward has begun and not ended.
  std::vector<uint8_t> claimed_;               // By unit: its gradient slot may be written.
  std::vector<std::vector<uint8_t>> arrived_;  // By bucket and segment: lies in the slot.
};

}  // namespace fsdp::engine
