#include "libfsdp/optim/clip.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace fsdp::optim {
namespace {

kernels::SquareSum squares_of(const std::vector<float>& values) {
  kernels::SquareSum squares;
  kernels::add_square_sums(values.data(), static_cast<int64_t>(values.size()), squares);
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

}  // namespace
}  // namespace fsdp::optim
