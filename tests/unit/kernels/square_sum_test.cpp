#include "libfsdp/kernels/square_sum.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/element_math.h"
#include "tests/unit/kernels/random_floats.h"

namespace fsdp::kernels {
namespace {

TEST(SquareSumTest, DoesNotDependOnHowTheShardsAreCut) {
  constexpr int64_t kQuanta = 200;
  const std::vector<float> values = random_floats(kQuanta * kQuantum, 1);
  SquareSum whole;
  add_square_sums(values.data(), kQuanta * kQuantum, whole);
  for (const int64_t per_rank : {1, 3, 64, 65, 199}) {
    SquareSum total;
    for (int64_t begin = 0; begin < kQuanta; begin += per_rank) {
      SquareSum rank;
      add_square_sums(values.data() + begin * kQuantum,
                      std::min(per_rank, kQuanta - begin) * kQuantum, rank);
      total.add(rank);
    }
    EXPECT_EQ(total.sum, whole.sum) << per_rank;
  }
}

TEST(SquareSumTest, QuantumFollowsTheWrittenOrder) {
  const std::vector<float> values = random_floats(kQuantum, 2);
  double lanes[kSquareLanes] = {};
  for (int64_t i = 0; i < kQuantum; ++i) {
    lanes[i % kSquareLanes] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  }
  const double expected = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
                          ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  double got = 0;
  EXPECT_EQ(quantum_square_sums(values.data(), kQuantum, &got), 0);
  EXPECT_EQ(got, expected);
}

TEST(SquareSumTest, IsTheSumOfSquaresWithinRounding) {
  constexpr int64_t kNumel = 512 * kQuantum;
  const std::vector<float> values = random_floats(kNumel, 3);
  SquareSum total;
  add_square_sums(values.data(), kNumel, total);
  long double expected = 0;
  for (const float value : values)
    expected += static_cast<long double>(value) * static_cast<long double>(value);
  // All terms are positive: the relative error of the sum is at most that of a quantum, 19
  // additions of 2^-53 each.
  EXPECT_NEAR(total.sum.to_double() / static_cast<double>(expected), 1.0, 20 * 0x1p-53);
}

TEST(SquareSumTest, CountsElementsThatAreNotFinite) {
  std::vector<float> values = random_floats(64 * kQuantum, 4);
  SquareSum without;
  add_square_sums(values.data() + kQuantum, 63 * kQuantum, without);
  values[0] = INFINITY;
  values[5] = NAN;
  values[127] = -INFINITY;
  SquareSum total;
  add_square_sums(values.data(), 64 * kQuantum, total);
  EXPECT_EQ(total.non_finite, 3);
  EXPECT_EQ(total.sum, without.sum);
}

TEST(SquareSumTest, LargestGradientsDoNotOverflow) {
  const std::vector<float> values(kQuantum, 3.0e38F);
  SquareSum total;
  add_square_sums(values.data(), kQuantum, total);
  EXPECT_NEAR(std::sqrt(total.sum.to_double()) / (3.0e38 * std::sqrt(128.0)), 1.0, 1e-7);
}

TEST(SquareSumTest, RefusesAPartialQuantum) {
  const std::vector<float> values(kQuantum);
  SquareSum total;
  EXPECT_THROW(add_square_sums(values.data(), 100, total), InternalError);
}

}  // namespace
}  // namespace fsdp::kernels
