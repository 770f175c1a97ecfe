#include "libfsdp/kernels/exact_sum.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace fsdp::kernels {
namespace {

constexpr double kTiny = std::numeric_limits<double>::denorm_min();
constexpr double kMax = std::numeric_limits<double>::max();

ExactSum sum_of(const std::vector<double>& terms) {
  ExactSum sum;
  for (const double term : terms) sum.add(term);
  return sum;
}

std::vector<double> random_terms(int n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<double> terms;
  while (static_cast<int>(terms.size()) < n) {
    const auto term = std::bit_cast<double>(random());  // all exponents and both signs
    if (std::isfinite(term)) terms.push_back(term);
  }
  return terms;
}

TEST(ExactSumTest, OneTermComesBackExactly) {
  for (const double term : random_terms(20000, 1)) EXPECT_EQ(sum_of({term}).to_double(), term);
  for (const double term :
       {0.0, kTiny, -kTiny, 2 * kTiny, 0x1p-1022, -0x1p-1022, 1.0, kMax, -kMax}) {
    EXPECT_EQ(sum_of({term}).to_double(), term);
  }
}

TEST(ExactSumTest, OrderAndGroupingDoNotMatter) {
  std::vector<double> terms = random_terms(3000, 2);
  const ExactSum expected = sum_of(terms);
  std::mt19937_64 random(3);
  for (int trial = 0; trial < 20; ++trial) {
    std::shuffle(terms.begin(), terms.end(), random);
    std::vector<ExactSum> parts(1 + random() % 7);
    for (const double term : terms) parts[random() % parts.size()].add(term);
    ExactSum total;
    for (const ExactSum& part : parts) total.add(part);
    EXPECT_EQ(total, expected);
    EXPECT_EQ(total.to_double(), expected.to_double());
  }
}

TEST(ExactSumTest, LargeTermsCancelAndLeaveTheSmallOne) {
  EXPECT_EQ(sum_of({1e300, 1e-300, -1e300}).to_double(), 1e-300);
  EXPECT_EQ(sum_of({kMax, kMax, kTiny, -kMax, -kMax}).to_double(), kTiny);
  EXPECT_EQ(sum_of({1, -1}).to_double(), 0);
  EXPECT_EQ(sum_of({kMax, kMax}).to_double(), INFINITY);
  EXPECT_EQ(sum_of({-kMax, -kMax}).to_double(), -INFINITY);
}

TEST(ExactSumTest, RoundsToNearestEven) {
  const double half_ulp = 0x1p-53;
  EXPECT_EQ(sum_of({1, half_ulp}).to_double(), 1);
  EXPECT_EQ(sum_of({1, half_ulp, kTiny}).to_double(), 1 + 0x1p-52);
  EXPECT_EQ(sum_of({1 + 0x1p-52, half_ulp}).to_double(), 1 + 0x1p-51);
  EXPECT_EQ(sum_of({-1, -half_ulp, -kTiny}).to_double(), -1 - 0x1p-52);
  EXPECT_EQ(sum_of({1, half_ulp, -kTiny}).to_double(), 1);
}

TEST(ExactSumTest, EqualsWideArithmeticWhereThatIsExact) {
  std::mt19937_64 random(4);
  for (int trial = 0; trial < 2000; ++trial) {
    int64_t expected = 0;
    ExactSum sum;
    for (int i = 0; i < 200; ++i) {
      const auto term =
          static_cast<int64_t>(random() >> (11 + random() % 40)) * (random() % 2 ? 1 : -1);
      expected += term;
      sum.add(std::ldexp(static_cast<double>(term), -70));
    }
    EXPECT_EQ(sum.to_double(), std::ldexp(static_cast<double>(expected), -70));
  }
}

TEST(ExactSumTest, LimbsOfManyRanksAddAsIntegers) {
  const std::vector<double> terms = random_terms(1000, 5);
  std::vector<ExactSum> ranks(16);
  for (size_t i = 0; i < terms.size(); ++i) ranks[i % ranks.size()].add(terms[i]);
  ExactSum::Limbs packet{};
  for (const ExactSum& rank : ranks) {
    const ExactSum::Limbs limbs = rank.limbs();
    for (size_t i = 0; i < packet.size(); ++i) packet[i] += limbs[i];
  }
  EXPECT_EQ(ExactSum::from_limbs(packet), sum_of(terms));
}

TEST(ExactSumTest, TermsThatAreNotFiniteAreCountedAndMakeNan) {
  const ExactSum sum = sum_of({1, INFINITY, -INFINITY, NAN});
  EXPECT_EQ(sum.non_finite_terms(), 3);
  EXPECT_TRUE(std::isnan(sum.to_double()));
  EXPECT_TRUE(std::isnan(ExactSum::from_limbs(sum.limbs()).to_double()));
}

}  // namespace
}  // namespace fsdp::kernels
