#include <map>
#include <set>
#include <string>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/plan/race_contents_impl.h"

namespace fsdp::plan::detail {
namespace {

// What a slot, stage or gradient shard holds, and which operation put it there.
struct Contents {
  int unit = -1;  // -1 = nothing.
  int micro_batch = -1;
  int step = -1;
  int writer = 0;
  bool reduced = false;  // Gradient slots, outer slot: a reduction, or gather, has read it.
  bool outer = false;    // Sums: of all replicas.
};

class Follower {
 public:
  Follower(const Schedule& schedule, std::vector<Race>& races)
      : schedule_(schedule), races_(races) {
    for (const Op& op : schedule.ops) {
      if (op.kind != OpKind::kOptimizer) continue;
      for (const Access& access : op.accesses) {
        if (access.write && access.buffer == BufferKind::kShard) updated_.insert(access.index);
      }
    }
  }

  void run_step(int step) {
    step_ = step;
    packet_done_ = false;
    optimizer_done_ = false;
    for (index_ = 0; index_ < static_cast<int>(schedule_.ops.size()); ++index_) visit();
    if (!optimizer_done_) object({}, index_ - 1, "the step has no optimizer");
  }

 private:
  const Op& op() const { return schedule_.ops[static_cast<size_t>(index_)]; }

  void object(const Access& access, int first_op, std::string reason) {
    for (const Race& race : races_) {
      if (race.second_op == index_ && race.access == access) return;
    }
    races_.push_back({.first_op = first_op,
                      .second_op = index_ < static_cast<int>(schedule_.ops.size()) ? index_ : 0,
                      .next_step = first_op > index_,
                      .access = access,
                      .reason = std::move(reason)});
  }

  void visit() {
    check_home();
    for (const Access& access : op().accesses) {
      switch (access.buffer) {
        case BufferKind::kShard:
          shard(access);
          break;
        case BufferKind::kStage:
          filled(access, stages_[access.index], "stage");
          break;
        case BufferKind::kSlot:
          filled(access, slots_[access.index], "slot");
          break;
        case BufferKind::kGradientSlot:
          gradient_slot(access);
          break;
        case BufferKind::kGradientStage:
          sums(access, gradient_stages_[access.index]);
          break;
        case BufferKind::kOuterSlot:
          outer_slot(access);
          break;
        case BufferKind::kGradientShard:
          sums(access, gradient_shards_[access.index]);
          break;
      }
    }
    if (op().kind == OpKind::kPacket) packet();
    if (op().kind == OpKind::kOptimizer) optimizer();
  }

  // An operation that names a slot must say that it uses it.
  void check_home() {
    const auto lists = [this](BufferKind buffer, int index) {
      for (const Access& access : op().accesses) {
        if (access.buffer == buffer && access.index == index) return true;
      }
      return false;
    };
    if (op().stage >= 0 && !lists(BufferKind::kStage, op().stage))
      object({BufferKind::kStage, op().stage}, index_, "the stage is not among its accesses");
    if (op().slot >= 0 && !lists(BufferKind::kSlot, op().slot)) {
      object({BufferKind::kSlot, op().slot}, index_, "the slot is not among its accesses");
    }
    const bool in_slot = op().kind == OpKind::kCollect || op().kind == OpKind::kReduce;
    if (in_slot && op().gradient_slot >= 0 &&
        !lists(BufferKind::kGradientSlot, op().gradient_slot)) {
      object({BufferKind::kGradientSlot, op().gradient_slot}, index_,
             "the gradient slot is not among its accesses");
    }
  }

  // Parameters of step t are those after t optimizers.
  void shard(const Access& access) {
    if (access.write) {
      ++updates_[access.index];
    } else if (updated_.count(access.index) != 0 && updates_[access.index] != step_) {
      object(access, index_,
             cat("reads parameters after ", updates_[access.index], " updates in step ", step_));
    }
  }

  void filled(const Access& access, Contents& held, std::string_view what) {
    if (access.write) {
      held = {.unit = access.unit, .step = step_, .writer = index_};
      return;
    }
    const int wanted = access.unit;
    if (held.unit != wanted || held.step != step_) {
      object(access, held.writer,
             cat("needs unit ", wanted, " of this step, the ", what, " holds ",
                 held.unit < 0
                     ? std::string("nothing")
                     : cat("unit ", held.unit, held.step == step_ ? "" : " of an earlier step")));
    }
  }

  void gradient_slot(const Access& access) {
    Contents& held = gradient_slots_[access.index];
    if (access.write) {
      collect(access, held);
      return;
    }
    if (held.unit != access.unit || held.micro_batch != op().micro_batch || held.step != step_) {
      object(access, held.writer,
             cat("needs the gradients of unit ", access.unit, ", micro-batch ", op().micro_batch));
    } else if (held.reduced) {
      object(access, held.writer, "reduces the same gradients twice");
    }
    held.reduced = true;
  }

  void collect(const Access& access, Contents& held) {
    const bool goes_on = held.unit == access.unit && held.step == step_ && !held.reduced &&
                         held.micro_batch + 1 == op().micro_batch;
    if (op().accumulate) {
      if (!goes_on) object(access, held.writer, "adds to gradients that are not there");
    } else if (held.unit >= 0 && !held.reduced) {
      object(access, held.writer,
             cat("overwrites gradients of unit ", held.unit, " that nobody reduced"));
    }
    held = {access.unit, op().micro_batch, step_, index_, false};
  }

  // A gradient shard, or the stage where its sums are made.
  void sums(const Access& access, Contents& held) {
    const bool mine = held.step == step_ && held.unit == op().unit;
    switch (op().kind) {
      case OpKind::kReduce:
        if (access.write) reduce(access, held, mine);
        return;
      case OpKind::kReduceOuter:
        if (!mine || held.outer)
          object(access, held.writer, "needs sums of this step that replicas have not added to");
        return;
      case OpKind::kGatherOuter:
        if (!mine || held.outer) object(access, held.writer, "replaces other sums");
        held.outer = true;
        held.writer = index_;
        return;
      case OpKind::kFetchSums:
      case OpKind::kStoreSums:
        if (access.write) {
          held = moved_;
          held.writer = index_;
        } else {
          if (!mine) object(access, held.writer, "no sums of this step are there");
          moved_ = held;
        }
        return;
      default:
        if (held.step != step_) object(access, held.writer, "no gradients of this step are there");
        if (held.outer != (schedule_.reduction == Reduction::kTwoLevel))
          object(access, held.writer, "the sums are not those of all replicas");
        if (held.micro_batch + 1 != schedule_.micro_batches)
          object(access, held.writer, "the last micro-batch has not been added");
    }
  }

  void reduce(const Access& access, Contents& held, bool mine) {
    if (op().accumulate != mine) {
      object(access, held.writer,
             op().accumulate ? "adds to gradients of an earlier step"
                             : "replaces gradients of this step");
    }
    if (op().accumulate && held.micro_batch + 1 != op().micro_batch)
      object(access, held.writer, cat("adds to the sums up to micro-batch ", held.micro_batch));
    const bool two_level = schedule_.reduction == Reduction::kTwoLevel;
    if (op().scope != (two_level ? Scope::kShardGroup : Scope::kWorld))
      object(access, index_, "reduces over the wrong ranks");
    held = {op().unit, op().micro_batch, step_, index_, false, false};
  }

  void outer_slot(const Access& access) {
    if (access.write) {
      if (outer_.unit >= 0 && !outer_.reduced)
        object(access, outer_.writer, "overwrites sums that nobody gathered");
      outer_ = {op().unit, op().micro_batch, step_, index_, false, true};
      return;
    }
    if (outer_.unit != op().unit || outer_.step != step_ || outer_.reduced)
      object(access, outer_.writer, cat("needs the replicas' sums of unit ", op().unit));
    outer_.reduced = true;
  }

  void packet() {
    packet_done_ = true;
    for (const auto& [index, held] : gradient_slots_) {
      if (held.unit >= 0 && !held.reduced) {
        object({BufferKind::kGradientSlot, index}, held.writer,
               cat("the gradients of unit ", held.unit, " have not been reduced"));
      }
    }
  }

  void optimizer() {
    if (!packet_done_) object({}, index_, "the optimizer comes before the packet");
    optimizer_done_ = true;
  }

  const Schedule& schedule_;
  std::vector<Race>& races_;
  std::set<int> updated_;  // Units that the optimizer writes.
  std::map<int, int> updates_;
  std::map<int, Contents> stages_;
  std::map<int, Contents> slots_;
  std::map<int, Contents> gradient_slots_;
  std::map<int, Contents> gradient_stages_;
  std::map<int, Contents> gradient_shards_;
  Contents outer_;
  Contents moved_;  // By the copy that is looked at.
  int step_ = 0;
  int index_ = 0;
  bool packet_done_ = false;
  bool optimizer_done_ = false;
};

}  // namespace

void check_contents(const Schedule& schedule, int steps, std::vector<Race>& races) {
  Follower follower(schedule, races);
  for (int step = 0; step < steps && races.empty(); ++step) follower.run_step(step);
}

}  // namespace fsdp::plan::detail
