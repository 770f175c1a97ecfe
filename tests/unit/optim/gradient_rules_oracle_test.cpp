// Clipping and loss scaling against PyTorch's.
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "libfsdp/optim/clip.h"
#include "libfsdp/optim/loss_scaler.h"
#include "libfsdp/optim/optimizer.h"
#include "tests/unit/optim/run_script.h"

namespace fsdp::optim {
namespace {

constexpr int64_t kNumel = 1280;
constexpr double kScale = 0.0371;
constexpr double kMaxNorm = 0.1;
constexpr double kClipValue = 0.05;
constexpr double kUnit = 0x1p-24;
// Growth, a backoff, growth again, two backoffs in a row, and a run up to the largest float.
constexpr char kOutcomes[] = "0000100000011000";

class GradientRulesOracleTest : public testing::Test {
 protected:
  void SetUp() override {
    static const std::string bytes = run_script(
        "gradient_rules_oracle.py",
        cat(kNumel, " ", kScale, " ", kMaxNorm, " ", kClipValue, " 65536 3 ", outcomes()));
    oracle_ = std::make_unique<OracleReader>(bytes);
    gradient_ = oracle_->take<float>(kNumel);
  }

  static std::string outcomes() { return kOutcomes + std::string(3 * 120, '0'); }

  /// What an update adds to a parameter at rate -1: the gradient as it was clipped.
  std::vector<float> clipped(const ClipDecision& decision) const {
    std::vector<float> parameter(kNumel);
    const std::vector<ParamGroup> groups = {{"all", 1.0, 0.0}};
    const std::vector<GroupSegment> segments = {{.end = kNumel}};
    make_optimizer({.kind = OptimizerKind::kSgd}, kNumel)
        ->update({.master = parameter.data(),
                  .gradient = gradient_.data(),
                  .numel = kNumel,
                  .segments = segments,
                  .groups = groups},
                 {.learning_rate = -1,
                  .gradient_scale = decision.gradient_scale,
                  .clip_value = decision.clip_value});
    return parameter;
  }

  ClipDecision decide(const ClipOptions& options) const {
    kernels::GradientSums sums;
    kernels::add_gradient_sums(gradient_.data(), kNumel, options.norm_type, sums);
    return clip_decision(sums, kScale, options);
  }

  std::unique_ptr<OracleReader> oracle_;
  std::vector<float> gradient_;
};

TEST_F(GradientRulesOracleTest, NormsAndClippedGradientsArePytorchs) {
  for (const NormType type : {NormType::kTwo, NormType::kOne, NormType::kInf}) {
    const ClipDecision decision = decide({.max_norm = kMaxNorm, .norm_type = type});
    const double norm = oracle_->take<float>(1)[0];
    // PyTorch sums 1280 terms in fp32, in 16 or more lanes: at most 80 + 4 additions on a path.
    EXPECT_NEAR(decision.grad_norm, norm, 90 * kUnit * norm) << static_cast<int>(type);
    EXPECT_LT(decision.coefficient, 1);
    const std::vector<float> expected = oracle_->take<float>(kNumel);
    const std::vector<float> got = clipped(decision);
    for (size_t i = 0; i < kNumel; ++i)
      ASSERT_NEAR(got[i], expected[i], 100 * kUnit * std::fabs(expected[i])) << i;
  }
  // By value there is nothing to sum: the same bits.
  const ClipDecision decision = decide({.clip_value = kClipValue});
  EXPECT_EQ(clipped(decision), oracle_->take<float>(kNumel));
  EXPECT_EQ(decision.coefficient, 1);
}

TEST_F(GradientRulesOracleTest, TheLossScaleIsPytorchs) {
  oracle_->take<float>(3 * (1 + kNumel) + kNumel);
  LossScaler scaler({.init_scale = 65536, .growth_interval = 3});
  for (const char outcome : outcomes()) {
    scaler.update(outcome == '1');
    EXPECT_EQ(scaler.scale(), oracle_->take<float>(1)[0]);
    EXPECT_EQ(scaler.state().growth_tracker, oracle_->take<int32_t>(1)[0]);
  }
  EXPECT_TRUE(oracle_->at_end());
  EXPECT_EQ(scaler.scale(), 0x1p127);  // The last growth would be infinite.
}

}  // namespace
}  // namespace fsdp::optim
