#include "libfsdp/kernels/update.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "libfsdp/kernels/split_master.h"
#include "tests/unit/kernels/random_floats.h"

namespace fsdp::kernels {
namespace {

constexpr int64_t kNumel = 1000;  // not a multiple of any vector: the tails count too

struct State {
  std::vector<float> master;
  std::vector<float> gradient;
  std::vector<float> first;
  std::vector<float> second;
};

State random_state() {
  State state{random_floats(kNumel, 1), random_floats(kNumel, 2), random_floats(kNumel, 3),
              random_floats(kNumel, 4)};
  for (float& value : state.second) value = std::fabs(value);
  return state;
}

constexpr AdamWScalars kAdamW{.grad_scale = 0.37F,
                              .clip_value = INFINITY,
                              .decay = 0.9999F,
                              .one_minus_beta1 = 0.1F,
                              .beta2 = 0.999F,
                              .one_minus_beta2 = 0.001F,
                              .step_size = 0.0123F,
                              .bias_correction2_sqrt = 0.0547F,
                              .epsilon = 1e-8F};
constexpr SgdScalars kSgd{.grad_scale = 0.37F,
                          .clip_value = INFINITY,
                          .weight_decay = 0.01F,
                          .learning_rate = 0.1F,
                          .momentum = 0.9F};

void adamw(State& state, int64_t begin, int64_t end) {
  adamw_f32(state.master.data() + begin, state.gradient.data() + begin, state.first.data() + begin,
            state.second.data() + begin, end - begin, kAdamW);
}

TEST(UpdateTest, AnElementsBitsDoNotDependOnWhereItLies) {
  State whole = random_state();
  adamw(whole, 0, kNumel);
  for (const int64_t width : {1, 3, 7, 16, 33, 500}) {
    State pieces = random_state();
    for (int64_t begin = 0; begin < kNumel; begin += width)
      adamw(pieces, begin, std::min(kNumel, begin + width));
    EXPECT_EQ(bits_of(pieces.master), bits_of(whole.master)) << width;
    EXPECT_EQ(bits_of(pieces.first), bits_of(whole.first)) << width;
    EXPECT_EQ(bits_of(pieces.second), bits_of(whole.second)) << width;
  }
}

TEST(UpdateTest, AdamwIsTheWrittenFormulaStepByStep) {
  const State before = random_state();
  State after = before;
  adamw(after, 0, kNumel);
  for (size_t i = 0; i < kNumel; ++i) {
    // volatile: every intermediate result is rounded, whatever the compiler would like
    volatile float g = before.gradient[i] * kAdamW.grad_scale;
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

struct SplitState {
  std::vector<uint16_t> high = std::vector<uint16_t>(kNumel);
  std::vector<uint16_t> remainder = std::vector<uint16_t>(kNumel);
  explicit SplitState(const std::vector<float>& master) {
    split_master_cpu(master.data(), high.data(), remainder.data(), kNumel);
  }
  std::vector<float> joined() const {
    std::vector<float> master(kNumel);
    join_master_cpu(high.data(), remainder.data(), master.data(), kNumel);
    return master;
  }
};

TEST(UpdateTest, SplitMasterTakesTheSameAdamwSteps) {
  State plain = random_state();
  State moments = random_state();
  SplitState split(plain.master);
  for (int step = 0; step < 10; ++step) {
    adamw(plain, 0, kNumel);
    adamw_split(split.high.data(), split.remainder.data(), moments.gradient.data(),
                moments.first.data(), moments.second.data(), kNumel, kAdamW);
  }
  EXPECT_EQ(bits_of(split.joined()), bits_of(plain.master));
  EXPECT_EQ(bits_of(moments.first), bits_of(plain.first));
}

TEST(UpdateTest, SplitMasterTakesTheSameSgdSteps) {
  for (const bool with_momentum : {false, true}) {
    for (const bool nesterov : {false, true}) {
      if (nesterov && !with_momentum) continue;
      State plain = random_state();
      State other = random_state();
      SplitState split(plain.master);
      for (int step = 0; step < 10; ++step) {
        sgd_f32(plain.master.data(), plain.gradient.data(),
                with_momentum ? plain.first.data() : nullptr, kNumel, nesterov, kSgd);
        sgd_split(split.high.data(), split.remainder.data(), other.gradient.data(),
                  with_momentum ? other.first.data() : nullptr, kNumel, nesterov, kSgd);
      }
      EXPECT_EQ(bits_of(split.joined()), bits_of(plain.master)) << with_momentum << nesterov;
    }
  }
}

TEST(UpdateTest, SgdIsTheWrittenFormula) {
  const State before = random_state();
  State after = before;
  sgd_f32(after.master.data(), after.gradient.data(), after.first.data(), kNumel, true, kSgd);
  for (size_t i = 0; i < kNumel; ++i) {
    volatile float scaled = before.gradient[i] * kSgd.grad_scale;
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
