#include "libfsdp/kernels/rounding.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "tests/unit/kernels/random_floats.h"

namespace fsdp::kernels {
namespace {

TEST(RoundingTest, BranchlessRoundingEqualsTheReferenceConversion) {
  const uint64_t stride = test_everything() ? 1 : 4093;
  int64_t wrong = 0;
  for (uint64_t bits = 0; bits <= 0xffffffffU; bits += stride) {
    const float value = bits_float(static_cast<uint32_t>(bits));
    wrong += round_bf16(value) != float_to_bf16(value) ? 1 : 0;
    wrong += round_f16(value) != float_to_f16(value) ? 1 : 0;
  }
  for (const uint32_t edge : {0x477fefffU, 0x477ff000U, 0x38800000U, 0x387fffffU, 0x33000000U,
                              0x33000001U, 0x7f7fffffU, 0x7f800000U, 0x7f800001U, 0x80000000U}) {
    wrong += round_bf16(bits_float(edge)) != float_to_bf16(bits_float(edge)) ? 1 : 0;
    wrong += round_f16(bits_float(edge)) != float_to_f16(bits_float(edge)) ? 1 : 0;
  }
  EXPECT_EQ(wrong, 0);
}

TEST(StochasticRoundingTest, TheMeanIsTheValue) {
  // N independent roundings of x between neighbours d apart: the mean's standard deviation is
  // d sqrt(p (1 - p) / N) with p = the part above the lower one. Five of them: one failure in 10^6.
  constexpr int64_t kTrials = 200000;
  const RoundingKey key = rounding_key(1, 2, 3);
  int value_index = 0;
  for (const float value :
       {1.0F + 0x1p-8F, 1.0F + 0x1p-15F, -3.14159F, 1e-3F, -1e-20F, 12345.678F}) {
    const uint32_t lower = float_bits(value) & 0xffff0000U;
    const double spacing = std::fabs(static_cast<double>(bits_float(lower + 0x10000U)) -
                                     static_cast<double>(bits_float(lower)));
    const double p = (static_cast<double>(value) - bits_float(lower)) /
                     (static_cast<double>(bits_float(lower + 0x10000U)) - bits_float(lower));
    double sum = 0;
    for (int64_t i = 0; i < kTrials; ++i) {
      const int64_t index = value_index * kTrials + i;
      sum += Bf16Source::widen(round_bf16_stochastic(value, random_word(key, index)));
    }
    EXPECT_NEAR(sum / kTrials, value, 5 * spacing * std::sqrt(p * (1 - p) / kTrials)) << value;
    ++value_index;
  }
}

TEST(StochasticRoundingTest, KeepsBfloat16AndSpecialValues) {
  for (uint32_t upper = 0; upper < 0x10000U; ++upper) {
    const float value = bits_float(upper << 16);
    const uint16_t got = round_bf16_stochastic(value, 0xffffffffU);
    EXPECT_EQ(got, round_bf16(value)) << std::hex << upper;
  }
  EXPECT_TRUE(std::isnan(Bf16Source::widen(round_bf16_stochastic(NAN, 0xffffffffU))));
}

TEST(RandomWordTest, EveryBitIsFairAndNeighboursAreIndependent) {
  // Counts of a fair coin: standard deviation sqrt(N) / 2; five of them for 32 bits and 32 pairs.
  constexpr int64_t kWords = 1 << 16;
  const double tolerance = 5 * std::sqrt(static_cast<double>(kWords)) / 2;
  for (const RoundingKey key :
       {rounding_key(0, 1, 0), rounding_key(0, 2, 0), rounding_key(9, 1, 5)}) {
    for (int bit = 0; bit < 32; ++bit) {
      int64_t ones = 0;
      int64_t changes = 0;
      for (int64_t i = 0; i < kWords; ++i) {
        ones += (random_word(key, i) >> bit) & 1U;
        changes += ((random_word(key, i) ^ random_word(key, i + 1)) >> bit) & 1U;
      }
      EXPECT_NEAR(static_cast<double>(ones), kWords / 2.0, tolerance) << bit;
      EXPECT_NEAR(static_cast<double>(changes), kWords / 2.0, tolerance) << bit;
    }
  }
}

TEST(RandomWordTest, SeedStepAndParameterChooseTheStream) {
  std::set<uint32_t> words;
  int streams = 0;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    for (int64_t step = 1; step < 9; ++step) {
      for (uint64_t parameter = 0; parameter < 8; ++parameter, ++streams)
        words.insert(random_word(rounding_key(seed, step, parameter), 0));
    }
  }
  EXPECT_EQ(words.size(), static_cast<size_t>(streams));  // Two equal: once in 30,000 choices.
}

}  // namespace
}  // namespace fsdp::kernels
