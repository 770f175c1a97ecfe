#include "libfsdp/shard/random.h"

#include <ATen/core/PhiloxRNGEngine.h>
#include <gtest/gtest.h>
#include <torch/utils.h>

#include <array>
#include <cmath>
#include <optional>
#include <set>
#include <thread>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/philox.h"

namespace fsdp {
namespace {

using kernels::PhiloxWords;

std::array<uint32_t, 4> words_of(const PhiloxWords& words) {
  return {words.word[0], words.word[1], words.word[2], words.word[3]};
}

// Counter, key and result of the three vectors that the authors publish (Random123, kat_vectors).
TEST(PhiloxTest, GivesThePublishedWords) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(words_of(kernels::philox4x32(PhiloxWords{{0, 0, 0, 0}}, 0)),
            (Words{0x6627e8d5U, 0xe169c58dU, 0xbc57ac4cU, 0x9b00dbd8U}));
  const uint32_t ones = 0xffffffffU;
  EXPECT_EQ(words_of(kernels::philox4x32(PhiloxWords{{ones, ones, ones, ones}}, ~uint64_t{0})),
            (Words{0x408f276dU, 0x41c83b0eU, 0xa20bc7c6U, 0x6d5451fdU}));
  const PhiloxWords pi{{0x243f6a88U, 0x85a308d3U, 0x13198a2eU, 0x03707344U}};
  EXPECT_EQ(words_of(kernels::philox4x32(pi, 0x299f31d0a4093822ULL)),
            (Words{0xd16cfe09U, 0x94fdccebU, 0x5001e420U, 0x24126ea1U}));
}

TEST(PhiloxTest, GivesTheWordsOfTorchsEngine) {
  for (uint64_t i = 0; i < 200; ++i) {
    const uint64_t key = mix64(i), low = mix64(i + 1000), high = mix64(i + 2000);
    at::Philox4_32 engine(key, /*subsequence=*/high, /*offset=*/low);
    const PhiloxWords words = kernels::philox4x32(low, high, key);
    for (const uint32_t word : words.word) EXPECT_EQ(word, engine());
  }
}

template <class Fill>
std::vector<float> filled(int64_t begin, size_t n, Fill&& fill) {
  std::vector<float> values(n);
  fill(begin, std::span(values));
  return values;
}

void normal(int64_t begin, std::span<float> out) { fill_normal(11, begin, out, 0.5, 3); }
void uniform(int64_t begin, std::span<float> out) { fill_uniform(12, begin, out, -2, 5); }
void truncated(int64_t begin, std::span<float> out) {
  fill_truncated_normal(13, begin, out, 0, 1, -1, 1.5);
}

TEST(RandomFillTest, DoesNotDependOnHowASequenceIsCut) {
  for (const auto fill : {normal, uniform, truncated}) {
    const std::vector<float> whole = filled(0, 301, fill);
    for (const size_t cut : {1, 2, 77, 150, 300}) {
      std::vector<float> joined = filled(0, cut, fill);
      const std::vector<float> rest = filled(static_cast<int64_t>(cut), whole.size() - cut, fill);
      joined.insert(joined.end(), rest.begin(), rest.end());
      EXPECT_EQ(joined, whole) << cut;
    }
  }
}

struct Moments {
  double mean = 0, variance = 0, fourth = 0, neighbours = 0;  // Central, but for the mean.
};
Moments moments_of(const std::vector<float>& values) {
  const auto n = static_cast<double>(values.size());
  Moments m;
  for (const float v : values) m.mean += v / n;
  for (size_t i = 0; i < values.size(); ++i) {
    const double d = values[i] - m.mean;
    m.variance += d * d / n;
    m.fourth += d * d * d * d / n;
    if (i > 0) m.neighbours += d * (values[i - 1] - m.mean) / n;
  }
  return m;
}

// A mean of n numbers is off by sigma / sqrt(n), a variance by sqrt((fourth - sigma^4) / n), the
// covariance of neighbours by sigma^2 / sqrt(n): five of these each.
void expect_moments(const std::vector<float>& values, double mean, double variance, double fourth) {
  const double five = 5 / std::sqrt(static_cast<double>(values.size()));
  const Moments m = moments_of(values);
  EXPECT_NEAR(m.mean, mean, five * std::sqrt(variance));
  EXPECT_NEAR(m.variance, variance, five * std::sqrt(fourth - variance * variance));
  EXPECT_NEAR(m.neighbours, 0, five * variance);
}

constexpr size_t kDraws = 200000;

TEST(RandomFillTest, HasTheMomentsOfItsDistribution) {
  expect_moments(filled(7, kDraws, normal), 0.5, 9, 3 * 81);
  const double width = 7;
  expect_moments(filled(7, kDraws, uniform), 1.5, width * width / 12, std::pow(width, 4) / 80);
  // Moments of a standard normal cut to [a, b], by their formulas with phi and Z.
  const double a = -1, b = 1.5;
  const auto phi = [](double x) { return std::exp(-x * x / 2) / std::sqrt(2 * M_PI); };
  const double z = 0.5 * (std::erfc(-b / std::sqrt(2.0)) - std::erfc(-a / std::sqrt(2.0)));
  const double mean = (phi(a) - phi(b)) / z;
  const double variance = 1 + (a * phi(a) - b * phi(b)) / z - mean * mean;
  expect_moments(filled(7, kDraws, truncated), mean, variance, 3 * variance * variance);
}

TEST(RandomFillTest, StaysInItsInterval) {
  for (const float v : filled(0, kDraws, truncated)) {
    EXPECT_GE(v, -1);
    EXPECT_LE(v, 1.5);
  }
  // In [1, 1 + 2^-22) there are two floats, and rounding to nearest would reach a third.
  const float end = 1 + 0x1p-22F;
  for (const float v :
       filled(0, 1000, [&](int64_t at, auto out) { fill_uniform(3, at, out, 1, end); })) {
    EXPECT_GE(v, 1);
    EXPECT_LT(v, end);
  }
  EXPECT_EQ(filled(0, 2, [](int64_t at, auto out) { fill_uniform(3, at, out, 2, 2); }),
            std::vector<float>({2, 2}));
}

TEST(RandomFillTest, RefusesAnIntervalThatHoldsAlmostNothing) {
  std::vector<float> values(4);
  EXPECT_THROW(fill_truncated_normal(1, 0, values, 0, 1, 4, 5), ConfigError);
  EXPECT_THROW(fill_truncated_normal(1, 0, values, 0, 1, 1, -1), ConfigError);
}

// A model: dropout, unit(dropout, nested(dropout), dropout), dropout. Returns the keys in order,
// and the unit's site through `site`.
std::vector<uint64_t> unit_keys() {
  std::vector<uint64_t> keys = {RandomScope::next_key()};
  {
    const RandomScope::UnitCall nested;
    keys.push_back(RandomScope::next_key());
  }
  keys.push_back(RandomScope::next_key());
  return keys;
}
std::vector<uint64_t> model_keys(RandomScope::Site* site = nullptr) {
  std::vector<uint64_t> keys = {RandomScope::next_key()};
  {
    const RandomScope::UnitCall unit;
    if (site) *site = unit.site();
    const std::vector<uint64_t> inside = unit_keys();
    keys.insert(keys.end(), inside.begin(), inside.end());
  }
  keys.push_back(RandomScope::next_key());
  return keys;
}

TEST(RandomScopeTest, AFunctionOfSeedStepMicroBatchAndCall) {
  std::set<std::vector<uint64_t>> all;
  std::set<uint64_t> keys;
  for (const uint64_t seed : {1, 2}) {
    for (const int64_t step : {1, 2}) {
      for (const int64_t micro_batch : {0, 1, 2}) {
        for (const int64_t call : {0, 1}) {
          std::vector<uint64_t> first, again;
          {
            const RandomScope::Root root(seed, step, micro_batch, call);
            first = model_keys();
          }
          const RandomScope::Root root(seed, step, micro_batch, call);
          again = model_keys();
          EXPECT_EQ(first, again);
          all.insert(first);
          keys.insert(first.begin(), first.end());
        }
      }
    }
  }
  EXPECT_EQ(all.size(), size_t{24});
  EXPECT_EQ(keys.size(), size_t{24 * 5});  // No two calls share a key.
}

TEST(RandomScopeTest, ACallEnteredAgainDrawsTheSameOnAnyThread) {
  RandomScope::Site site;
  std::vector<uint64_t> first;
  {
    const RandomScope::Root root(1, 1, 0, 0);
    first = model_keys(&site);
  }
  first = {first.begin() + 1, first.end() - 1};
  std::vector<uint64_t> here, there;
  {
    const RandomScope::UnitCall again(site);
    here = unit_keys();
  }
  std::thread([&] {
    const RandomScope::UnitCall again(site);
    there = unit_keys();
  }).join();
  EXPECT_EQ(here, first);
  EXPECT_EQ(there, first);
}

TEST(RandomScopeTest, EnteringACallAgainDoesNotMoveTheOuterScope) {
  const auto run = [](bool again) {
    const RandomScope::Root root(1, 1, 0, 0);
    RandomScope::Site site;
    model_keys(&site);
    if (again) {
      const RandomScope::UnitCall recomputed(site);
      unit_keys();
    }
    return RandomScope::next_key();
  };
  EXPECT_EQ(run(false), run(true));
}

TEST(RandomScopeTest, OutsideOfAModelTheDefaultGeneratorDecides) {
  EXPECT_FALSE(RandomScope::active());
  torch::manual_seed(5);
  const std::vector<uint64_t> first = model_keys();
  const std::vector<uint64_t> second = model_keys();
  torch::manual_seed(5);
  EXPECT_EQ(model_keys(), first);
  EXPECT_NE(first, second);
  const RandomScope::UnitCall unit;
  EXPECT_FALSE(unit.site().has_value());
  EXPECT_FALSE(RandomScope::active());
}

}  // namespace
}  // namespace fsdp
