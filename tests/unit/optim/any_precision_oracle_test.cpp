// AnyPrecision AdamW against its published formula, computed by PyTorch.
#include <gtest/gtest.h>

#include "libfsdp/optim/optimizer.h"
#include "tests/unit/optim/run_script.h"

namespace fsdp::optim {
namespace {

constexpr int64_t kNumel = 2048;
constexpr int kSteps = 20;

struct Case {
  std::string name;  // That of the oracle: momentum, variance, compensation.
  OptimizerOptions options;
};

OptimizerOptions options_of(DType momentum, DType variance, bool kahan, DType compensation) {
  return {.kind = OptimizerKind::kAnyPrecisionAdamW,
          .momentum_dtype = momentum,
          .variance_dtype = variance,
          .use_kahan_summation = kahan,
          .compensation_buffer_dtype = compensation};
}

std::vector<Case> cases() {
  constexpr DType f32 = DType::kF32;
  constexpr DType bf16 = DType::kBF16;
  return {{"f32,f32,none", options_of(f32, f32, false, bf16)},
          {"bf16,bf16,none", options_of(bf16, bf16, false, bf16)},
          {"f32,bf16,bf16", options_of(f32, bf16, true, bf16)},
          {"bf16,bf16,bf16", options_of(bf16, bf16, true, bf16)},
          {"bf16,f32,f32", options_of(bf16, f32, true, f32)}};
}

std::vector<std::byte> take_bytes(OracleReader& oracle, DType dtype) {
  return oracle.take<std::byte>(kNumel * static_cast<int64_t>(dtype_bytes(dtype)));
}

TEST(AnyPrecisionOracleTest, TwentyStepsHaveTheBitsOfThePublishedFormula) {
  std::string arguments = cat(kNumel, " ", kSteps, " 1e-2 0.1");
  for (const Case& c : cases()) arguments += " " + c.name;
  OracleReader oracle(run_script("any_precision_oracle.py", arguments));
  const std::vector<ParamGroup> groups = {{"all", 1.0, 0.1}};
  const std::vector<GroupSegment> segments = {{0, 300, 0}, {300, kNumel, 0}};
  for (const Case& c : cases()) {
    const auto optimizer = make_optimizer(c.options, kNumel);
    std::vector<uint16_t> parameter = oracle.take<uint16_t>(kNumel);
    for (int step = 1; step <= kSteps; ++step) {
      const std::vector<float> gradient = oracle.take<float>(kNumel);
      optimizer->update({.high = parameter.data(),
                         .gradient = gradient.data(),
                         .numel = kNumel,
                         .segments = segments,
                         .groups = groups},
                        {.learning_rate = 1e-2, .step = step});
      ASSERT_EQ(parameter, oracle.take<uint16_t>(kNumel)) << c.name << " step " << step;
      for (const StateTensor& state : optimizer->state_tensors()) {
        const std::vector<std::byte> expected = take_bytes(oracle, state.dtype);
        ASSERT_TRUE(
            std::equal(expected.begin(), expected.end(), state.values.begin(), state.values.end()))
            << c.name << " step " << step << ' ' << state.name;
      }
    }
  }
  EXPECT_TRUE(oracle.at_end());
}

}  // namespace
}  // namespace fsdp::optim
