#include "libfsdp/optim/clip.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "libfsdp/base/error.h"

namespace fsdp::optim {
namespace {

kernels::GradientSums squares_of(const std::vector<float>& values) {
  kernels::GradientSums squares;
  kernels::add_gradient_sums(values.data(), static_cast<int64_t>(values.size()),
                             kernels::NormType::kTwo, squares);
  return squares;
}

TEST(ClipTest, NormIsThatOfTheAveragedGradient) {
  std::vector<float> gradient(128);
  gradient[3] = 30;
  gradient[77] = -40;
  const ClipDecision decision = clip_decision(squares_of(gradient), 0.1, 1.0);
  EXPECT_TRUE(decision.finite);
  EXPECT_DOUBLE_EQ(decision.grad_norm, 5.0);
  EXPECT_DOUBLE_EQ(decision.coefficient, 1.0 / (5.0 + 1e-6));
  EXPECT_DOUBLE_EQ(decision.gradient_scale, 0.1 / (5.0 + 1e-6));
}

TEST(ClipTest, SmallGradientsAndNoLimitAreNotScaled) {
  std::vector<float> gradient(128);
  gradient[0] = 0.5F;
  EXPECT_EQ(clip_decision(squares_of(gradient), 1.0, 1.0).coefficient, 1.0);
  gradient[0] = 50;
  EXPECT_EQ(clip_decision(squares_of(gradient), 1.0, 0.0).coefficient, 1.0);
  EXPECT_EQ(clip_coefficient(50, -1), 1.0);
}

TEST(ClipTest, OneElementThatIsNotFiniteStopsTheUpdate) {
  for (const float bad : {INFINITY, -INFINITY, NAN}) {
    std::vector<float> gradient(256, 1.0F);
    gradient[200] = bad;
    const ClipDecision decision = clip_decision(squares_of(gradient), 1.0, 1.0);
    EXPECT_FALSE(decision.finite);
    EXPECT_EQ(decision.gradient_scale, 0);
    EXPECT_TRUE(std::isnan(decision.grad_norm));
  }
}

TEST(ClipTest, TheOtherNormsAreThoseOfTheAveragedGradient) {
  std::vector<float> gradient(128);
  gradient[3] = 30;
  gradient[77] = -40;
  const auto decide = [&](NormType type) {
    kernels::GradientSums sums;
    kernels::add_gradient_sums(gradient.data(), 128, type, sums);
    return clip_decision(sums, 0.1, {.max_norm = 1, .norm_type = type, .clip_value = 0.5});
  };
  EXPECT_DOUBLE_EQ(decide(NormType::kOne).grad_norm, 7.0);
  EXPECT_DOUBLE_EQ(decide(NormType::kInf).grad_norm, 4.0);
  EXPECT_DOUBLE_EQ(decide(NormType::kInf).coefficient, 1.0 / (4.0 + 1e-6));
  EXPECT_EQ(decide(NormType::kInf).clip_value, 0.5);
  gradient[5] = NAN;
  for (const NormType type : {NormType::kOne, NormType::kInf}) EXPECT_FALSE(decide(type).finite);
}

TEST(ClipTest, NormsAndLimitsAreChecked) {
  EXPECT_EQ(norm_type_from_name("2.0"), NormType::kTwo);
  EXPECT_EQ(norm_type_from_name("1"), NormType::kOne);
  EXPECT_EQ(norm_type_from_name("inf"), NormType::kInf);
  EXPECT_THROW(norm_type_from_name("3"), ConfigError);
  EXPECT_THROW((ClipOptions{.clip_value = -1}.validate()), ConfigError);
  EXPECT_THROW((ClipOptions{.clip_value = NAN}.validate()), ConfigError);
  EXPECT_NO_THROW(ClipOptions{}.validate());
}

}  // namespace
}  // namespace fsdp::optim
