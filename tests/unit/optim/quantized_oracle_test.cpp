// 8-bit AdamW against bitsandbytes' own implementation.
#include <gtest/gtest.h>

#include <cmath>

#include "libfsdp/kernels/quantized_state.h"
#include "libfsdp/optim/optimizer.h"
#include "tests/unit/optim/run_script.h"

namespace fsdp::optim {
namespace {

constexpr int kSteps = 20;
constexpr double kRate = 1e-2;
constexpr double kDecay = 0.1;
constexpr double kUnit = 0x1p-24;             // Largest relative rounding error of one operation.
constexpr int64_t kLarge = 4096 + 256 + 100;  // A last block that is not full.
constexpr int64_t kSmall = 1000;              // Keeps 32 bits.

struct Expected {
  std::vector<float> gradient;
  std::vector<float> parameter;
  std::vector<std::vector<std::byte>> state;
};

template <class T>
std::vector<T> values_of(const std::vector<std::byte>& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

/// Elements whose codes differ; more than a step apart is an error. In a block of zeros any code
/// means zero.
int64_t count_other_codes(const std::vector<std::byte>& got, const std::vector<std::byte>& expected,
                          const std::vector<float>& absmax) {
  int64_t count = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (absmax[i / kernels::kStateBlock] == 0) continue;
    const int apart = std::to_integer<int>(got[i]) - std::to_integer<int>(expected[i]);
    EXPECT_LE(std::abs(apart), 1) << i;
    count += apart != 0 ? 1 : 0;
  }
  return count;
}

void expect_near(const std::vector<float>& got, const std::vector<float>& expected, double absolute,
                 double relative, std::string_view what) {
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], expected[i], absolute + relative * std::fabs(expected[i]))
        << what << ' ' << i;
  }
}

class QuantizedOracleTest : public testing::Test {
 protected:
  void SetUp() override {
    static const std::string bytes =
        run_script("bitsandbytes_oracle.py",
                   cat(kSteps, " ", kRate, " ", kDecay, " ", kLarge, " ", kSmall), 77);
    if (bytes.empty()) GTEST_SKIP() << "bitsandbytes is not installed: scripts/bootstrap.sh";
    oracle_ = std::make_unique<OracleReader>(bytes);
    signed_map_ = oracle_->take<float>(256);
    unsigned_map_ = oracle_->take<float>(256);
  }

  Expected take_step(int64_t numel) {
    Expected expected{oracle_->take<float>(numel), oracle_->take<float>(numel), {}};
    const bool quantized = numel >= 4096;
    const int64_t blocks = (numel + kernels::kStateBlock - 1) / kernels::kStateBlock;
    for (int k = 0; k < 2; ++k) {
      expected.state.push_back(oracle_->take<std::byte>(quantized ? numel : numel * 4));
      if (quantized) expected.state.push_back(oracle_->take<std::byte>(blocks * 4));
    }
    return expected;
  }

  std::unique_ptr<OracleReader> oracle_;
  std::vector<float> signed_map_;
  std::vector<float> unsigned_map_;
};

TEST_F(QuantizedOracleTest, MapsAreThoseOfBitsandbytes) {
  for (size_t i = 0; i < 256; ++i) {
    EXPECT_EQ(kernels::signed_dynamic_map().values[i], signed_map_[i]) << i;
    EXPECT_EQ(kernels::unsigned_dynamic_map().values[i], unsigned_map_[i]) << i;
  }
}

// Every step starts from the oracle's parameter and state, so that differences do not add up.
TEST_F(QuantizedOracleTest, EveryStepFollowsBitsandbytes) {
  const std::vector<GroupSegment> segments = {{.begin = 0, .end = kLarge, .param_numel = kLarge},
                                              {.begin = kLarge, .end = kLarge + kSmall}};
  const int64_t numel = kLarge + kSmall;
  const auto optimizer = make_optimizer({.kind = OptimizerKind::kAdamW8bit}, numel, segments);
  const std::vector<ParamGroup> groups = {{"all", 1.0, kDecay}};
  std::vector<float> parameter = oracle_->take<float>(numel);
  std::vector<float> gradient(parameter.size());
  int64_t other_codes = 0;
  for (int step = 1; step <= kSteps; ++step) {
    const Expected expected[2] = {take_step(kLarge), take_step(kSmall)};
    std::copy_n(expected[0].gradient.begin(), kLarge, gradient.begin());
    std::copy_n(expected[1].gradient.begin(), kSmall, gradient.begin() + kLarge);
    optimizer->update({.master = parameter.data(),
                       .gradient = gradient.data(),
                       .numel = numel,
                       .segments = segments,
                       .groups = groups},
                      {.learning_rate = kRate, .step = step});
    size_t k = 0;
    for (int p = 0; p < 2; ++p) {
      const auto begin = parameter.begin() + (p == 0 ? 0 : kLarge);
      expect_near({begin, begin + (p == 0 ? kLarge : kSmall)}, expected[p].parameter,
                  150 * kRate * kUnit, 3 * kUnit, "parameter");
      std::copy(expected[p].parameter.begin(), expected[p].parameter.end(), begin);
      for (size_t i = 0; i < expected[p].state.size(); ++i) {
        const std::vector<std::byte>& state = expected[p].state[i];
        const StateTensor& mine = optimizer->state_tensors()[k++];
        const std::vector<std::byte> got(mine.values.begin(), mine.values.end());
        ASSERT_EQ(got.size(), state.size()) << mine.name;
        if (mine.dtype == DType::kU8) {
          other_codes += count_other_codes(got, state, values_of<float>(expected[p].state[i + 1]));
        } else {
          // exp_avg may cancel: its terms are gradients, which are below 5.
          const bool first = mine.name == "state1" || mine.name == "absmax1";
          expect_near(values_of<float>(got), values_of<float>(state), first ? 20 * kUnit : 0,
                      8 * kUnit, mine.name);
        }
        std::copy(state.begin(), state.end(), mine.values.begin());
      }
    }
  }
  EXPECT_TRUE(oracle_->at_end());
  // A code differs where value / absmax lies within rounding (about 2^-21 of it) of a midpoint
  // between two codes, which are at most 2^-7 of it apart in the upper decades: one in 10,000.
  EXPECT_LE(other_codes, 2 * kLarge * kSteps / 2000);
}

}  // namespace
}  // namespace fsdp::optim
