#include "libfsdp/kernels/gradient_sums.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/element_math.h"
#include "tests/unit/kernels/random_floats.h"

namespace fsdp::kernels {
namespace {

TEST(GradientSumsTest, DoNotDependOnHowTheShardsAreCut) {
  constexpr int64_t kQuanta = 200;
  const std::vector<float> values = random_floats(kQuanta * kQuantum, 1);
  for (const NormType type : {NormType::kTwo, NormType::kOne, NormType::kInf}) {
    GradientSums whole;
    add_gradient_sums(values.data(), kQuanta * kQuantum, type, whole);
    for (const int64_t per_rank : {1, 3, 64, 65, 199}) {
      GradientSums total;
      for (int64_t begin = 0; begin < kQuanta; begin += per_rank) {
        GradientSums rank;
        add_gradient_sums(values.data() + begin * kQuantum,
                          std::min(per_rank, kQuanta - begin) * kQuantum, type, rank);
        total.add(rank);
      }
      EXPECT_EQ(total.sum, whole.sum) << per_rank;
      EXPECT_EQ(total.max_abs, whole.max_abs) << per_rank;
    }
  }
}

TEST(GradientSumsTest, MagnitudesAreSummedAndTheLargestIsFound) {
  std::vector<float> values(2 * kQuantum);
  values[3] = -2.5F;
  values[100] = 1;
  values[200] = -7;
  values[201] = INFINITY;
  values[255] = NAN;
  GradientSums one;
  add_gradient_sums(values.data(), 2 * kQuantum, NormType::kOne, one);
  EXPECT_EQ(one.sum.to_double(), 3.5);  // Without the second quantum.
  EXPECT_EQ(one.non_finite, 2);
  GradientSums largest;
  add_gradient_sums(values.data(), 2 * kQuantum, NormType::kInf, largest);
  EXPECT_EQ(largest.max_abs, 7.0F);
  EXPECT_EQ(largest.non_finite, 2);
}

TEST(GradientSumsTest, QuantumFollowsTheWrittenOrder) {
  const std::vector<float> values = random_floats(kQuantum, 2);
  double lanes[kQuantumLanes] = {};
  for (int64_t i = 0; i < kQuantum; ++i) {
    lanes[i % kQuantumLanes] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  }
  const double expected = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
                          ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  double got = 0;
  EXPECT_EQ(quantum_sums(values.data(), kQuantum, NormType::kTwo, &got), 0);
  EXPECT_EQ(got, expected);
}

TEST(GradientSumsTest, IsTheSumOfSquaresWithinRounding) {
  constexpr int64_t kNumel = 512 * kQuantum;
  const std::vector<float> values = random_floats(kNumel, 3);
  GradientSums total;
  add_gradient_sums(values.data(), kNumel, NormType::kTwo, total);
  long double expected = 0;
  for (const float value : values)
    expected += static_cast<long double>(value) * static_cast<long double>(value);
  // All terms are positive: the relative error of the sum is at most that of a quantum, 19
  // additions of 2^-53 each.
  EXPECT_NEAR(total.sum.to_double() / static_cast<double>(expected), 1.0, 20 * 0x1p-53);
}

TEST(GradientSumsTest, CountsElementsThatAreNotFinite) {
  std::vector<float> values = random_floats(64 * kQuantum, 4);
  GradientSums without;
  add_gradient_sums(values.data() + kQuantum, 63 * kQuantum, NormType::kTwo, without);
  values[0] = INFINITY;
  values[5] = NAN;
  values[127] = -INFINITY;
  GradientSums total;
  add_gradient_sums(values.data(), 64 * kQuantum, NormType::kTwo, total);
  EXPECT_EQ(total.non_finite, 3);
  EXPECT_EQ(total.sum, without.sum);
}

TEST(GradientSumsTest, LargestGradientsDoNotOverflow) {
  const std::vector<float> values(kQuantum, 3.0e38F);
  GradientSums total;
  add_gradient_sums(values.data(), kQuantum, NormType::kTwo, total);
  EXPECT_NEAR(std::sqrt(total.sum.to_double()) / (3.0e38 * std::sqrt(128.0)), 1.0, 1e-7);
}

TEST(GradientSumsTest, RefusesAPartialQuantum) {
  const std::vector<float> values(kQuantum);
  GradientSums total;
  EXPECT_THROW(add_gradient_sums(values.data(), 100, NormType::kTwo, total), InternalError);
}

}  // namespace
}  // namespace fsdp::kernels
