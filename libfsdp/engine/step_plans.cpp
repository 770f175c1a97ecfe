#include "libfsdp/engine/step_plans.h"

#include <algorithm>

#include "libfsdp/base/error.h"
#include "libfsdp/plan/race_check.h"

namespace fsdp::engine {
namespace {

constexpr size_t kMaxPlans = 32;  // A model whose order changes in every step must not fill memory.
// A schedule depends on the mesh only in whether an axis has more than one rank.
constexpr int kCheckedPerAxis = 2;

}  // namespace

StepPlans::StepPlans(const plan::Layout& layout, const plan::Placement& placement,
                     const plan::SlotMap& slots, bool recompute, bool verify)
    : verify_(verify) {
  for (size_t unit = 0; unit < layout.units.size(); ++unit)
    input_.trainable.push_back(layout.trainable_numel(static_cast<int>(unit)) > 0);
  input_.recompute = recompute;
  input_.placement = placement;
  input_.slots = slots;
}

const StepPlan& StepPlans::find(const std::vector<plan::Call>& calls, int micro_batches) {
  const auto found = std::find_if(plans_.begin(), plans_.end(), [&](const StepPlan& plan) {
    return plan.schedule.micro_batches == micro_batches && plan.calls == calls;
  });
  if (found != plans_.end()) {
    plans_.splice(plans_.begin(), plans_, found);
    return plans_.front();
  }
  plans_.push_front(make(calls, micro_batches));
  if (plans_.size() > kMaxPlans) plans_.pop_back();
  return plans_.front();
}

StepPlan StepPlans::make(const std::vector<plan::Call>& calls, int micro_batches) const {
  plan::ScheduleInput input = input_;
  input.calls = calls;
  input.micro_batches = micro_batches;
  StepPlan plan{.calls = calls, .schedule = plan::compile(input)};
  plan.hash = plan.schedule.hash();
  const size_t units = input.trainable.size();
  plan.collect.assign(static_cast<size_t>(micro_batches) * units, -1);
  plan.first_backward.assign(static_cast<size_t>(micro_batches), plan.schedule.ops.size());
  plan.has_gradient.assign(units, 0);
  for (size_t i = 0; i < plan.schedule.ops.size(); ++i) {
    const plan::Op& op = plan.schedule.ops[i];
    const auto m = static_cast<size_t>(op.micro_batch);
    if (op.kind == plan::OpKind::kBackward)
      plan.first_backward[m] = std::min(plan.first_backward[m], i);
    if (op.kind != plan::OpKind::kCollect) continue;
    plan.collect[m * units + static_cast<size_t>(op.unit)] = static_cast<int>(i);
    plan.has_gradient[static_cast<size_t>(op.unit)] = 1;
  }
  if (verify_) {
    plan::Schedule small = plan.schedule;
    small.mesh = {std::min(small.mesh.replicate, kCheckedPerAxis),
                  std::min(small.mesh.shard, kCheckedPerAxis)};
    const std::vector<plan::Race> races = plan::find_races(small, small.mesh.size());
    check(races.empty(), races.empty() ? "" : races.front().to_string(plan.schedule));
  }
  return plan;
}

}  // namespace fsdp::engine
