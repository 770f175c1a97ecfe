#include "libfsdp/optim/optimizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/split_master.h"

namespace fsdp::optim {
namespace {

constexpr int64_t kNumel = 384;
const std::vector<ParamGroup> kGroups = {
    {"decay", 1.0, 0.1}, {"no decay", 1.0, 0.0}, {"slow", 0.5, 0.0}};

std::vector<float> ramp(float begin, float step) {
  std::vector<float> values(kNumel);
  for (size_t i = 0; i < values.size(); ++i) values[i] = begin + step * static_cast<float>(i);
  return values;
}

BucketView view_of(std::vector<float>& master, const std::vector<float>& gradient,
                   const std::vector<GroupSegment>& segments) {
  return {.master = master.data(),
          .gradient = gradient.data(),
          .numel = static_cast<int64_t>(master.size()),
          .segments = segments,
          .groups = kGroups};
}

std::span<const float> values_of(const StateTensor& state) {
  EXPECT_EQ(state.dtype, DType::kF32);
  return {reinterpret_cast<const float*>(state.values.data()), state.values.size() / sizeof(float)};
}

TEST(OptimizerTest, WhatNoSegmentCoversIsNotTouched) {
  const std::vector<GroupSegment> segments = {{10, 100, 1}, {200, 300, 1}};
  for (const OptimizerKind kind : {OptimizerKind::kAdamW, OptimizerKind::kSgd}) {
    const auto optimizer = make_optimizer({.kind = kind, .momentum = 0.9}, kNumel);
    std::vector<float> master = ramp(1, 0.01F);
    const std::vector<float> before = master;
    const std::vector<float> gradient = ramp(3, 0.1F);
    optimizer->update(view_of(master, gradient, segments), {.learning_rate = 0.1});
    for (size_t i = 0; i < master.size(); ++i) {
      const bool covered = (i >= 10 && i < 100) || (i >= 200 && i < 300);
      EXPECT_EQ(master[i] != before[i], covered) << i;
      for (const StateTensor& state : optimizer->state_tensors())
        EXPECT_EQ(values_of(state)[i] != 0, covered) << i;
    }
  }
}

TEST(OptimizerTest, GroupsScaleTheRateAndDecayTheWeights) {
  // The first AdamW step moves by rate * sign(gradient), decay aside.
  const std::vector<GroupSegment> segments = {{0, 128, 0}, {128, 256, 1}, {256, 384, 2}};
  const auto optimizer = make_optimizer({}, kNumel);
  std::vector<float> master(kNumel, 2.0F);
  const std::vector<float> gradient(kNumel, 5.0F);
  optimizer->update(view_of(master, gradient, segments), {.learning_rate = 0.25});
  EXPECT_NEAR(master[0], 2.0 * (1 - 0.25 * 0.1) - 0.25, 1e-6);
  EXPECT_NEAR(master[128], 2.0 - 0.25, 1e-6);
  EXPECT_NEAR(master[256], 2.0 - 0.125, 1e-6);
}

TEST(OptimizerTest, GradientScaleIsAppliedToTheGradient) {
  const std::vector<GroupSegment> segments = {{0, kNumel, 1}};
  std::vector<float> scaled(kNumel, 1.0F);
  std::vector<float> plain(kNumel, 1.0F);
  const std::vector<float> gradient = ramp(-4, 0.25F);
  std::vector<float> quarter = gradient;
  for (float& value : quarter) value *= 0.25F;
  const OptimizerOptions options{.kind = OptimizerKind::kSgd};
  make_optimizer(options, kNumel)
      ->update(view_of(scaled, gradient, segments), {.learning_rate = 0.1, .gradient_scale = 0.25});
  make_optimizer(options, kNumel)
      ->update(view_of(plain, quarter, segments), {.learning_rate = 0.1});
  EXPECT_EQ(scaled, plain);
  EXPECT_NEAR(scaled[0], 1.0 + 0.1 * 4 * 0.25, 1e-6);
}

TEST(OptimizerTest, TheScaledGradientIsClampedByValue) {
  const std::vector<GroupSegment> segments = {{0, kNumel, 1}};
  std::vector<float> clipped(kNumel, 1.0F);
  std::vector<float> expected(kNumel, 1.0F);
  const std::vector<float> gradient = ramp(-4, 0.025F);
  std::vector<float> clamped = gradient;
  for (float& value : clamped) value = std::clamp(value * 0.5F, -0.75F, 0.75F);
  const OptimizerOptions options{.kind = OptimizerKind::kSgd};
  make_optimizer(options, kNumel)
      ->update(view_of(clipped, gradient, segments),
               {.learning_rate = 0.1, .gradient_scale = 0.5, .clip_value = 0.75});
  make_optimizer(options, kNumel)
      ->update(view_of(expected, clamped, segments), {.learning_rate = 0.1});
  EXPECT_EQ(clipped, expected);
  EXPECT_NE(clamped[0], gradient[0] * 0.5F);
}

TEST(OptimizerTest, SplitMasterEqualsPlainMasterOverManySteps) {
  const std::vector<GroupSegment> segments = {{0, 130, 0}, {130, kNumel, 2}};
  const auto plain = make_optimizer({}, kNumel);
  const auto split = make_optimizer({}, kNumel);
  std::vector<float> master = ramp(-1, 0.007F);
  std::vector<uint16_t> high(kNumel);
  std::vector<uint16_t> remainder(kNumel);
  kernels::split_master_cpu(master.data(), high.data(), remainder.data(), kNumel);
  for (int64_t step = 1; step <= 20; ++step) {
    const std::vector<float> gradient = ramp(-2, 0.01F * static_cast<float>(step));
    const UpdateScalars scalars{.learning_rate = 1e-3, .step = step};
    plain->update(view_of(master, gradient, segments), scalars);
    split->update({.high = high.data(),
                   .remainder = remainder.data(),
                   .gradient = gradient.data(),
                   .numel = kNumel,
                   .segments = segments,
                   .groups = kGroups},
                  scalars);
  }
  std::vector<float> joined(kNumel);
  kernels::join_master_cpu(high.data(), remainder.data(), joined.data(), kNumel);
  EXPECT_EQ(joined, master);
}

TEST(OptimizerTest, StateThatIsCopiedOverContinuesTheSameRun) {
  const std::vector<GroupSegment> segments = {{0, kNumel, 0}};
  const std::vector<float> gradient = ramp(1, -0.01F);
  const auto first = make_optimizer({}, kNumel);
  std::vector<float> master = ramp(0, 0.1F);
  first->update(view_of(master, gradient, segments), {.learning_rate = 0.1, .step = 1});
  const auto resumed = make_optimizer({}, kNumel);
  for (size_t i = 0; i < first->state_tensors().size(); ++i) {
    const StateTensor from = first->state_tensors()[i];
    const StateTensor to = resumed->state_tensors()[i];
    EXPECT_EQ(from.name, i == 0 ? "exp_avg" : "exp_avg_sq");
    std::copy(from.values.begin(), from.values.end(), to.values.begin());
  }
  std::vector<float> other = master;
  first->update(view_of(master, gradient, segments), {.learning_rate = 0.1, .step = 2});
  resumed->update(view_of(other, gradient, segments), {.learning_rate = 0.1, .step = 2});
  EXPECT_EQ(other, master);
}

TEST(OptimizerTest, StateIsWhatThePlanCounts) {
  EXPECT_EQ(state_bytes({}, kNumel), 8 * kNumel);
  EXPECT_EQ(state_bytes({.kind = OptimizerKind::kSgd}, kNumel), 0);
  EXPECT_EQ(state_bytes({.kind = OptimizerKind::kSgd, .momentum = 0.9}, kNumel), 4 * kNumel);
  EXPECT_EQ(make_optimizer({}, 0)->state_tensors().size(), 2U);
  EXPECT_NO_THROW(make_optimizer({}, 0)->update({}, {.learning_rate = 1}));
}

TEST(OptimizerTest, RefusesViewsThatDoNotFit) {
  const auto optimizer = make_optimizer({}, kNumel);
  std::vector<float> master(kNumel);
  const std::vector<float> gradient(kNumel);
  std::vector<float> shorter(kNumel - 128);
  const auto update = [&](std::vector<float>& to, const std::vector<GroupSegment>& segments,
                          int64_t step) {
    optimizer->update(view_of(to, gradient, segments), {.learning_rate = 1, .step = step});
  };
  EXPECT_THROW(update(shorter, {}, 1), InternalError);
  EXPECT_THROW(update(master, {{0, kNumel + 1, 0}}, 1), InternalError);
  EXPECT_THROW(update(master, {{0, 1, 3}}, 1), InternalError);
  EXPECT_THROW(update(master, {{0, 1, 0}}, 0), InternalError);
  EXPECT_THROW(optimizer->update({.numel = kNumel}, {}), InternalError);
}

TEST(OptimizerTest, RefusesOptionsOutsidePytorchsRange) {
  EXPECT_THROW(make_optimizer({.beta1 = 1.0}, 0), ConfigError);
  EXPECT_THROW(make_optimizer({.beta2 = -0.1}, 0), ConfigError);
  EXPECT_THROW(make_optimizer({.epsilon = -1}, 0), ConfigError);
  EXPECT_THROW(make_optimizer({.kind = OptimizerKind::kSgd, .nesterov = true}, 0), ConfigError);
  EXPECT_EQ(optimizer_kind_from_name("adamw_torch"), OptimizerKind::kAdamW);
  EXPECT_EQ(optimizer_kind_from_name("sgd"), OptimizerKind::kSgd);
  EXPECT_THROW(optimizer_kind_from_name("adam"), ConfigError);
}

}  // namespace
}  // namespace fsdp::optim
