// Runs a compiled schedule on one rank: the model's calls are its compute operations, everything
// else is done here.
//
// The caller (fsdp::shard) tells where the model is: enter/leave of units in forward,
// start/enter/finish of backward. The executor issues the communication that stands before that
// point, waits for what the point depends on, and throws when the model does something that the
// schedule does not hold. Torch-free.
//
// Note [First step]
// The order of calls is not known before the model has run once. Until then units are gathered on
// demand, slot by slot in the order of their first call, which is the order that the compiler uses
// too. The schedule is compiled when the first backward starts. Forwards without gradients
// (evaluation) are always run on demand.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/engine/storage.h"
#include "libfsdp/kernels/square_sum.h"
#include "libfsdp/optim/clip.h"
#include "libfsdp/optim/optimizer.h"
#include "libfsdp/plan/schedule.h"

namespace fsdp::engine {

struct ExecutorOptions {
  bool poison = false;  ///< Fill a slot with NaN when its contents end: for tests.
  optim::OptimizerOptions optimizer;
  std::vector<optim::ParamGroup> groups;  ///< ParamSpec::group is an index into these.
};

/// What a step did, equal on all ranks.
struct StepStats {
  int64_t step = 0;  ///< 1 for the first.
  double loss = 0;   ///< Sum of token losses / trainable tokens, over all ranks and micro-batches.
  double grad_norm = 0;          ///< 2-norm of that loss's gradient, before clipping.
  int64_t trainable_tokens = 0;  ///< Over all ranks.
  int64_t micro_batches = 0;     ///< Over all ranks, ghosts not counted.
};

struct StepOptions {
  double learning_rate = 0;
  double max_grad_norm = 0;  ///< 0 = no clipping.
};

class Executor {
 public:
  /// Collective over comm's world. `layout.mesh` has comm's size.
  Executor(plan::Layout layout, plan::Placement placement, std::shared_ptr<comm::Communicator> comm,
           const ExecutorOptions& options);

  Storage& storage() { return storage_; }
  const plan::Layout& layout() const { return storage_.layout(); }
  const plan::Placement& placement() const { return placement_; }
  comm::Communicator& comm() { return *comm_; }
  /// Of a trainable bucket.
  optim::ShardOptimizer& optimizer(int bucket) {
    return *optimizers_.at(static_cast<size_t>(bucket));
  }
  int64_t step() const { return step_; }
  /// The schedule of the current step; null before the first backward.
  const plan::Schedule* schedule() const { return schedule_; }

  /// Slot of `unit`: -1 = resident. Fixed from the unit's first call on.
  int slot_of(int unit);

  /// Collective. `micro_batches` of this rank (0 is legal); ranks may differ. Throws ConfigError
  /// inside a step.
  void begin_step(int64_t micro_batches);
  bool in_step() const { return in_step_; }

  /// Around a unit's forward; unit 0 (the root) surrounds the whole model. `graph`: gradients are
  /// recorded.
  void enter_forward(int unit, bool graph);
  void leave_forward(int unit) noexcept;

  /// Around the backward of one micro-batch.
  void start_backward(double loss_sum, int64_t trainable_tokens);
  void enter_backward(int unit);
  void finish_backward();
  bool in_backward() const { return in_backward_; }
  /// Where the unit's gradient of this micro-batch is collected.
  std::byte* gradient(int unit, int bucket);
  /// Notes a gradient (bucket, segment of the bucket); returns whether it is the first of this
  /// micro-batch.
  bool gradient_arrived(int bucket, int segment);

  /// Joins the collectives of a forward without gradients, without a model call: for ranks without
  /// data.
  void ghost_forward();

  /// Collective. Joins with ghost micro-batches when other ranks had more, agrees on loss and norm,
  /// updates. Throws NumericsError on all ranks, without an update, when a loss or a gradient is
  /// not finite.
  StepStats finish_step(const StepOptions& options);

 private:
  struct Contents {
    int unit = -1;
    int64_t version = -1;
  };
  struct MicroBatchResult {
    double loss_sum = 0;
    int64_t trainable_tokens = 0;
  };

  bool scheduled() const { return in_step_ && schedule_ != nullptr; }
  void compile_schedule();
  std::vector<int> call_order() const;
  void compile_behind_first_forward();
  void gather_on_demand(int unit);
  void gather_all_on_demand();
  comm::Ticket begin_gather(int unit, int slot);
  comm::Ticket begin_reduce(const plan::Op& op);
  void begin_communication(size_t index);
  void satisfy(const plan::Op& op);
  void issue_communication();
  /// Issues communication up to the next compute operation, and satisfies that one.
  void advance();
  /// Brings the cursor to the given compute operation of this micro-batch, skipping units that the
  /// model left out.
  void reach(plan::OpKind kind, int unit);
  [[noreturn]] void throw_out_of_order(plan::OpKind kind, int unit, const plan::Op& expected) const;
  void skip_backward(const plan::Op& op);
  void leave_backward();
  void zero_missing_gradients(int unit, int gradient_slot);
  void ghost_micro_batch();
  std::string where() const;

  void make_packet();
  StepStats read_packets(kernels::SquareSum& squares);
  void update(const StepStats& stats, const optim::ClipDecision& decision, double learning_rate);

  std::shared_ptr<comm::Communicator> comm_;
  plan::Placement placement_;
  ExecutorOptions options_;
  Storage storage_;
  std::vector<int> shard_group_;
  std::vector<int> world_;
  std::vector<std::unique_ptr<optim::ShardOptimizer>> optimizers_;  // By bucket; null when frozen.
  std::vector<plan::ShardSlice> slices_;                            // Of this rank.
  std::vector<optim::GroupSegment> segments_;  // Of the bucket that is being updated.

  std::vector<int> order_;                   // Units in the order of their first call.
  std::vector<int> slot_of_unit_;            // -2 = not called yet.
  std::vector<Contents> contents_;           // By slot.
  int64_t version_ = 0;                      // Of the parameters.
  std::map<int, plan::Schedule> schedules_;  // By number of micro-batches.

  // The current step.
  bool in_step_ = false;
  bool in_backward_ = false;
  int64_t step_ = 0;
  int64_t local_micro_batches_ = 0;
  int micro_batches_ = 0;  // Of the rank that has most.
  int micro_batch_ = 0;
  const plan::Schedule* schedule_ = nullptr;
  uint64_t schedule_hash_ = 0;
  size_t cursor_ = 0;
  std::vector<comm::Ticket> tickets_;           // By operation.
  std::vector<comm::Ticket> previous_tickets_;  // Of the step before.
  const plan::Schedule* previous_schedule_ = nullptr;
  int active_forward_ = -1;
  int active_backward_ = -1;
  std::vector<MicroBatchResult> results_;  // By micro-batch of this rank.
  std::vector<MicroBatchResult>
      global_results_;  // By global micro-batch, accumulation step * ranks + rank.
  std::vector<std::byte> packet_;
  std::vector<std::byte> packets_;
  std::vector<std::vector<uint8_t>> arrived_;  // By bucket and segment: in this micro-batch.
  std::vector<std::vector<uint8_t>> used_;     // By bucket and segment: in this step.
};

}  // namespace fsdp::engine
