// Learning rate as a pure function of the step. The formulas are those of transformers' schedules.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <utility>

namespace fsdp::optim {

enum class LrScheduleKind {
  kConstant,  ///< No warm-up.
  kConstantWithWarmup,
  kLinear,  ///< Down to 0 at the last step.
  kCosine,  ///< Half a cosine by default.
  kStep,    ///< gamma^epoch, as torch's StepLR that is stepped once an epoch.
};

constexpr std::array<std::pair<LrScheduleKind, std::string_view>, 5> names_of(LrScheduleKind) {
  return {{{LrScheduleKind::kConstant, "constant"},
           {LrScheduleKind::kConstantWithWarmup, "constant_with_warmup"},
           {LrScheduleKind::kLinear, "linear"},
           {LrScheduleKind::kCosine, "cosine"},
           {LrScheduleKind::kStep, "step"}}};
}

/// Transformers' names: "constant", "constant_with_warmup", "linear", "cosine", and "step". Throws
/// ConfigError that lists them.
LrScheduleKind lr_schedule_kind_from_name(std::string_view name);

struct LrScheduleOptions {
  LrScheduleKind kind = LrScheduleKind::kLinear;
  double learning_rate = 5e-5;  ///< After the warm-up.
  double warmup_steps =
      0;  ///< Optimizer steps; below 1 it is a fraction of the total, as in transformers.
  double warmup_ratio = 0;      ///< Fraction of the total; used when warmup_steps is 0.
  double num_cycles = 0.5;      ///< Cosine: waves after the warm-up.
  double gamma = 0.85;          ///< Step: factor per epoch.
  int64_t steps_per_epoch = 0;  ///< Step: optimizer steps of one epoch; needed by that kind only.

  /// Throws ConfigError for a value that makes no schedule.
  void validate() const;
};

/// Warm-up steps of a run: ceil(total * ratio) when given as a ratio.
int64_t warmup_steps_of(const LrScheduleOptions& options, int64_t total_steps);

/// Factor on the learning rate at 0-based `step` of `total_steps`: the rate of the update that
/// makes step + 1 updates.
double lr_factor(const LrScheduleOptions& options, int64_t step, int64_t total_steps);

/// learning_rate * lr_factor.
double learning_rate(const LrScheduleOptions& options, int64_t step, int64_t total_steps);

}  // namespace fsdp::optim
