// The schedules that a rank has compiled, one for each order of calls and number of micro-batches.
#pragma once

#include <cstdint>
#include <list>
#include <vector>

#include "libfsdp/plan/layout.h"
#include "libfsdp/plan/schedule.h"

namespace fsdp::engine {

/// A schedule and what the executor looks up in it.
struct StepPlan {
  std::vector<plan::Call> calls;
  plan::Schedule schedule;
  uint64_t hash = 0;
  std::vector<int> collect;            ///< Operation, by micro-batch * units + unit; -1 = none.
  std::vector<size_t> first_backward;  ///< Operation, by micro-batch.
  std::vector<uint8_t> has_gradient;   ///< By unit: it is reduced.

  int collect_of(int micro_batch, int unit) const {
    return collect[static_cast<size_t>(micro_batch) * has_gradient.size() +
                   static_cast<size_t>(unit)];
  }
};

class StepPlans {
 public:
  /// `verify`: look for races in every plan that is compiled (InternalError that names one).
  StepPlans(const plan::Layout& layout, const plan::Placement& placement,
            const plan::SlotMap& slots, bool recompute, bool verify);

  /// The plan for `calls`, compiled when it is new. Valid until 32 others have been asked for.
  const StepPlan& find(const std::vector<plan::Call>& calls, int micro_batches);

 private:
  StepPlan make(const std::vector<plan::Call>& calls, int micro_batches) const;

  plan::ScheduleInput input_;  // Without calls and micro-batches.
  bool verify_;
  std::list<StepPlan> plans_;  // The last used first.
};

}  // namespace fsdp::engine
