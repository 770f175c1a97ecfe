#include "libfsdp/kernels/update.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "tests/unit/kernels/update_cases.h"

namespace fsdp::kernels {
namespace {

constexpr int64_t kNumel = 1000;  // not a multiple of any vector: the tails count too

void step_adamw(UpdateState& state, ParameterForm form, int64_t begin = 0, int64_t end = kNumel) {
  adamw(state.arrays(form, begin), state.gradient.data() + begin, state.first.data() + begin,
        state.second.data() + begin, end - begin, kAdamW);
}

void step_sgd(UpdateState& state, ParameterForm form, bool with_momentum, bool nesterov,
              int64_t begin = 0, int64_t end = kNumel) {
  sgd(state.arrays(form, begin), state.gradient.data() + begin,
      with_momentum ? state.first.data() + begin : nullptr, end - begin, nesterov, kSgd);
}

void expect_equal(const UpdateState& got, const UpdateState& expected) {
  EXPECT_EQ(bits_of(got.master), bits_of(expected.master));
  EXPECT_EQ(bits_of(got.first), bits_of(expected.first));
  EXPECT_EQ(bits_of(got.second), bits_of(expected.second));
  EXPECT_EQ(got.high, expected.high);
  EXPECT_EQ(got.remainder, expected.remainder);
  EXPECT_EQ(got.copy, expected.copy);
}

TEST(UpdateTest, AnElementsBitsDoNotDependOnWhereItLies) {
  for (const ParameterForm form : kForms) {
    UpdateState whole(kNumel);
    step_adamw(whole, form);
    step_sgd(whole, form, true, true);
    for (const int64_t width : {1, 3, 7, 16, 33, 500}) {
      UpdateState pieces(kNumel);
      for (int64_t begin = 0; begin < kNumel; begin += width)
        step_adamw(pieces, form, begin, std::min(kNumel, begin + width));
      for (int64_t begin = 0; begin < kNumel; begin += width)
        step_sgd(pieces, form, true, true, begin, std::min(kNumel, begin + width));
      SCOPED_TRACE(testing::Message() << "form " << static_cast<int>(form) << " width " << width);
      expect_equal(pieces, whole);
    }
  }
}

TEST(UpdateTest, AdamwIsTheWrittenFormulaStepByStep) {
  const UpdateState before(kNumel);
  UpdateState after = before;
  step_adamw(after, ParameterForm::kF32);
  for (size_t i = 0; i < kNumel; ++i) {
    // volatile: every intermediate result is rounded, whatever the compiler would like
    volatile float scaled_gradient = before.gradient[i] * kAdamW.grad_scale;
    volatile float g =
        std::clamp(static_cast<float>(scaled_gradient), -kAdamW.clip_value, kAdamW.clip_value);
    volatile float decayed = before.master[i] * kAdamW.decay;
    volatile float difference = g - before.first[i];
    volatile float weighted = kAdamW.one_minus_beta1 * difference;
    volatile float m = before.first[i] + weighted;
    volatile float kept = before.second[i] * kAdamW.beta2;
    volatile float scaled = kAdamW.one_minus_beta2 * g;
    volatile float square = scaled * g;
    volatile float v = kept + square;
    volatile float root = std::sqrt(v);
    volatile float corrected = root / kAdamW.bias_correction2_sqrt;
    volatile float denominator = corrected + kAdamW.epsilon;
    volatile float numerator = kAdamW.step_size * m;
    volatile float change = numerator / denominator;
    ASSERT_EQ(float_bits(after.master[i]), float_bits(decayed - change)) << i;
    ASSERT_EQ(float_bits(after.first[i]), float_bits(m)) << i;
    ASSERT_EQ(float_bits(after.second[i]), float_bits(v)) << i;
  }
}

/// The fp32 values of a parameter after an update in one step from `before`, by the fp32 form.
template <class Step>
std::vector<float> wide_result(UpdateState before, const Step& step) {
  step(before, ParameterForm::kF32);
  return before.master;
}

// Every form computes what the fp32 form computes, from the value that it holds, and rounds at the
// end.
template <class Step>
void expect_forms_agree(const Step& step) {
  UpdateState plain(kNumel);
  UpdateState split(kNumel);
  for (int i = 0; i < 10; ++i) {
    step(plain, ParameterForm::kF32);
    step(split, ParameterForm::kSplit);
  }
  std::vector<float> joined(kNumel);
  join_master_cpu(split.high.data(), split.remainder.data(), joined.data(), kNumel);
  EXPECT_EQ(bits_of(joined), bits_of(plain.master));
  EXPECT_EQ(bits_of(split.first), bits_of(plain.first));

  for (const ParameterForm form : {ParameterForm::kF32AndBf16, ParameterForm::kF32AndF16}) {
    UpdateState copied(kNumel);
    for (int i = 0; i < 10; ++i) step(copied, form);
    EXPECT_EQ(bits_of(copied.master), bits_of(plain.master));
    std::vector<uint16_t> rounded(kNumel);
    convert_floats(plain.master.data(), DType::kF32, rounded.data(),
                   form == ParameterForm::kF32AndF16 ? DType::kF16 : DType::kBF16, kNumel);
    EXPECT_EQ(copied.copy, rounded);
  }

  UpdateState pure(kNumel);
  for (size_t i = 0; i < kNumel; ++i) pure.master[i] = bf16_to_float(pure.high[i]);
  const std::vector<float> wide = wide_result(pure, step);
  step(pure, ParameterForm::kBf16);
  for (size_t i = 0; i < kNumel; ++i) EXPECT_EQ(pure.high[i], float_to_bf16(wide[i])) << i;
}

TEST(UpdateTest, AdamwGivesTheSameInEveryForm) {
  expect_forms_agree([](UpdateState& state, ParameterForm form) { step_adamw(state, form); });
}

TEST(UpdateTest, SgdGivesTheSameInEveryForm) {
  for (const auto& [with_momentum, nesterov] :
       {std::pair(false, false), std::pair(true, false), std::pair(true, true)}) {
    SCOPED_TRACE(testing::Message() << with_momentum << nesterov);
    expect_forms_agree([&](UpdateState& state, ParameterForm form) {
      step_sgd(state, form, with_momentum, nesterov);
    });
  }
}

TEST(UpdateTest, RandomRoundingTakesANeighbourOfTheExactResult) {
  UpdateState state(kNumel);
  for (size_t i = 0; i < kNumel; ++i) state.master[i] = bf16_to_float(state.high[i]);
  const std::vector<float> wide =
      wide_result(state, [](UpdateState& s, ParameterForm form) { step_adamw(s, form); });
  step_adamw(state, ParameterForm::kBf16Stochastic);
  int up = 0;
  int inexact = 0;
  for (size_t i = 0; i < kNumel; ++i) {
    const auto below = static_cast<uint16_t>(float_bits(wide[i]) >> 16);  // Towards zero.
    const bool exact = (float_bits(wide[i]) & 0xffffU) == 0;
    EXPECT_TRUE(state.high[i] == below || (!exact && state.high[i] == below + 1)) << i;
    inexact += exact ? 0 : 1;
    up += state.high[i] == below ? 0 : 1;
  }
  EXPECT_GT(up, inexact / 3);
  EXPECT_LT(up, inexact * 2 / 3);
}

TEST(UpdateTest, SgdIsTheWrittenFormula) {
  const UpdateState before(kNumel);
  UpdateState after = before;
  step_sgd(after, ParameterForm::kF32, true, true);
  for (size_t i = 0; i < kNumel; ++i) {
    volatile float unclipped = before.gradient[i] * kSgd.grad_scale;
    volatile float scaled =
        std::clamp(static_cast<float>(unclipped), -kSgd.clip_value, kSgd.clip_value);
    volatile float decay = kSgd.weight_decay * before.master[i];
    volatile float g = scaled + decay;
    volatile float kept = before.first[i] * kSgd.momentum;
    volatile float buffer = kept + g;
    volatile float ahead = kSgd.momentum * buffer;
    volatile float direction = g + ahead;
    volatile float change = kSgd.learning_rate * direction;
    ASSERT_EQ(float_bits(after.master[i]), float_bits(before.master[i] - change)) << i;
    ASSERT_EQ(float_bits(after.first[i]), float_bits(buffer)) << i;
  }
}

}  // namespace
}  // namespace fsdp::kernels
