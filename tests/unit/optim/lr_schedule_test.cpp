#include "libfsdp/optim/lr_schedule.h"

#include <gtest/gtest.h>

#include "libfsdp/base/error.h"

namespace fsdp::optim {
namespace {

TEST(LrScheduleTest, WarmsUpInStepsOrAsARatio) {
  EXPECT_EQ(warmup_steps_of({.warmup_steps = 10}, 100), 10);
  EXPECT_EQ(warmup_steps_of({.warmup_steps = 0.25}, 100), 25);
  EXPECT_EQ(warmup_steps_of({.warmup_ratio = 0.031}, 100), 4);
  EXPECT_EQ(warmup_steps_of({.warmup_steps = 10, .warmup_ratio = 0.5}, 100), 10);
  EXPECT_EQ(warmup_steps_of({}, 100), 0);
}

TEST(LrScheduleTest, StepFallsOnceAnEpochAfterTheWarmUp) {
  const LrScheduleOptions options{.kind = LrScheduleKind::kStep,
                                  .learning_rate = 2,
                                  .warmup_steps = 2,
                                  .gamma = 0.5,
                                  .steps_per_epoch = 4};
  const double expected[] = {0, 1, 2, 2, 1, 1, 1, 1, 0.5, 0.5};
  for (int64_t step = 0; step < 10; ++step)
    EXPECT_DOUBLE_EQ(learning_rate(options, step, 10), expected[step]);
}

TEST(LrScheduleTest, ConstantHasNoWarmUp) {
  EXPECT_EQ(lr_factor({.kind = LrScheduleKind::kConstant, .warmup_steps = 10}, 0, 100), 1.0);
}

TEST(LrScheduleTest, NamesAreThoseOfTransformers) {
  for (const auto& [kind, name] : names_of(LrScheduleKind{}))
    EXPECT_EQ(lr_schedule_kind_from_name(name), kind);
  EXPECT_THROW(lr_schedule_kind_from_name("polynomial"), ConfigError);
}

TEST(LrScheduleTest, RefusesValuesThatMakeNoSchedule) {
  EXPECT_THROW((LrScheduleOptions{.learning_rate = -1}.validate()), ConfigError);
  EXPECT_THROW((LrScheduleOptions{.warmup_ratio = 1.5}.validate()), ConfigError);
  EXPECT_THROW((LrScheduleOptions{.gamma = 0}.validate()), ConfigError);
  EXPECT_NO_THROW(LrScheduleOptions{}.validate());
}

}  // namespace
}  // namespace fsdp::optim
