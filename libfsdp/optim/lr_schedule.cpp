#include "libfsdp/optim/lr_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "libfsdp/base/error.h"

namespace fsdp::optim {
namespace {

double at_least_one(double value) { return std::max(1.0, value); }

double cosine_factor(double progress, double num_cycles) {
  return std::max(0.0, 0.5 * (1.0 + std::cos(std::numbers::pi * num_cycles * 2.0 * progress)));
}

double step_factor(const LrScheduleOptions& options, int64_t step) {
  check(options.steps_per_epoch > 0, "the step schedule needs steps_per_epoch");
  return std::pow(options.gamma, static_cast<double>(step / options.steps_per_epoch));
}

}  // namespace

LrScheduleKind lr_schedule_kind_from_name(std::string_view name) {
  std::string known;
  for (const auto& [kind, kind_name] : names_of(LrScheduleKind{})) {
    if (kind_name == name) return kind;
    known += cat(known.empty() ? "" : ", ", kind_name);
  }
  throw ConfigError(cat("unknown learning-rate schedule '", name, "'. Known: ", known));
}

void LrScheduleOptions::validate() const {
  const auto require = [](bool condition, std::string_view field, double value,
                          std::string_view expected) {
    if (!condition)
      throw ConfigError(cat("lr schedule: ", field, " is ", value, "; expected ", expected));
  };
  require(learning_rate >= 0 && std::isfinite(learning_rate), "learning_rate", learning_rate,
          "a number >= 0");
  require(warmup_steps >= 0 && std::isfinite(warmup_steps), "warmup_steps", warmup_steps,
          "a number >= 0");
  require(warmup_ratio >= 0 && warmup_ratio <= 1, "warmup_ratio", warmup_ratio, "0 <= ratio <= 1");
  require(std::isfinite(num_cycles), "num_cycles", num_cycles, "a finite number");
  require(gamma > 0 && std::isfinite(gamma), "gamma", gamma, "a number > 0");
}

int64_t warmup_steps_of(const LrScheduleOptions& options, int64_t total_steps) {
  if (options.warmup_steps >= 1) return static_cast<int64_t>(options.warmup_steps);
  const double ratio = options.warmup_steps > 0 ? options.warmup_steps : options.warmup_ratio;
  return static_cast<int64_t>(std::ceil(static_cast<double>(total_steps) * ratio));
}

double lr_factor(const LrScheduleOptions& options, int64_t step, int64_t total_steps) {
  if (options.kind == LrScheduleKind::kConstant) return 1.0;
  const auto now = static_cast<double>(step);
  const auto total = static_cast<double>(total_steps);
  const auto warmup = static_cast<double>(warmup_steps_of(options, total_steps));
  if (now < warmup) return now / at_least_one(warmup);
  switch (options.kind) {
    case LrScheduleKind::kLinear:
      return std::max(0.0, (total - now) / at_least_one(total - warmup));
    case LrScheduleKind::kCosine:
      return cosine_factor((now - warmup) / at_least_one(total - warmup), options.num_cycles);
    case LrScheduleKind::kStep:
      return step_factor(options, step);
    default:
      return 1.0;
  }
}

double learning_rate(const LrScheduleOptions& options, int64_t step, int64_t total_steps) {
  return options.learning_rate * lr_factor(options, step, total_steps);
}

}  // namespace fsdp::optim
