#include "libfsdp/shard/dropout_loop.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/philox.h"

namespace fsdp {
namespace {

constexpr uint64_t kKey = 0x0123456789abcdefULL;

// The definition in Note [Dropout mask], element by element.
bool kept(int64_t element, double p) {
  const auto i = static_cast<uint64_t>(element);
  const kernels::PhiloxWords words = kernels::philox4x32((i / 64) * 16 + i % 16, 0, kKey);
  return static_cast<double>(words.word[(i % 64) / 16]) >= std::round(p * 0x1p32);
}

std::vector<float> run(const std::vector<float>& x, int64_t begin, double p, uint64_t key = kKey) {
  std::vector<float> y(x.size());
  apply_dropout(x.data(), y.data(), DType::kF32, begin, static_cast<int64_t>(x.size()), key, p);
  return y;
}

TEST(DropoutLoopTest, FollowsItsDefinitionFromAnyElement) {
  const double p = 0.3;
  std::vector<float> x(331);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i) + 1;
  // Also where the number of the block needs more than 32 bits.
  for (const int64_t begin :
       {int64_t{0}, int64_t{1}, int64_t{63}, int64_t{64}, int64_t{1000}, (int64_t{1} << 40) + 5}) {
    const std::vector<float> y = run(x, begin, p);
    for (size_t i = 0; i < x.size(); ++i) {
      const float expected =
          kept(begin + static_cast<int64_t>(i), p) ? x[i] * static_cast<float>(1 / (1 - p)) : 0.0F;
      ASSERT_EQ(y[i], expected) << begin << " + " << i;
    }
  }
}

TEST(DropoutLoopTest, HalfTypesTakeTheSameMaskAndRoundOnce) {
  const double p = 0.1;
  const int64_t n = 500;
  std::vector<float> x;
  for (int64_t i = 0; i < n; ++i)
    x.push_back(std::ldexp(1.0F + 0.37F * float(i), int(i % 20) - 18));
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    std::vector<uint16_t> half(x.size()), out(x.size()), expected(x.size());
    convert_floats(x.data(), DType::kF32, half.data(), dtype, x.size());
    apply_dropout(half.data(), out.data(), dtype, 9, n, kKey, p);
    std::vector<float> exact(x.size());
    convert_floats(half.data(), dtype, exact.data(), DType::kF32, x.size());
    exact = run(exact, 9, p);
    convert_floats(exact.data(), DType::kF32, expected.data(), dtype, x.size());
    EXPECT_EQ(out, expected) << dtype_name(dtype);
  }
}

TEST(DropoutLoopTest, KeepsTheShareItShould) {
  const int64_t n = 1 << 20;
  for (const double p : {1e-3, 0.1, 0.5, 0.9}) {
    const std::vector<float> y = run(std::vector<float>(n, 1.0F), 0, p);
    double kept_count = 0, neighbours = 0, columns = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      kept_count += y[i] != 0;
      if (i >= 1) neighbours += y[i] != 0 && y[i - 1] != 0;
      if (i >= 64) columns += y[i] != 0 && y[i - 64] != 0;
    }
    const double q = 1 - p;
    // Binomial: five standard deviations. Pairs overlap in one element, which at most doubles their
    // variance twice.
    EXPECT_NEAR(kept_count / n, q, 5 * std::sqrt(p * q / n)) << p;
    EXPECT_NEAR(neighbours / n, q * q, 10 * std::sqrt(q * q * (1 - q * q) / n)) << p;
    EXPECT_NEAR(columns / n, q * q, 10 * std::sqrt(q * q * (1 - q * q) / n)) << p;
  }
}

TEST(DropoutLoopTest, KeysGiveIndependentMasks) {
  const int64_t n = 1 << 18;
  const std::vector<float> ones(n, 1.0F);
  const std::vector<float> a = run(ones, 0, 0.5, 1), b = run(ones, 0, 0.5, 2);
  double equal = 0;
  for (size_t i = 0; i < a.size(); ++i) equal += a[i] == b[i];
  EXPECT_NEAR(equal / n, 0.5, 5 * 0.5 / std::sqrt(n));
}

TEST(DropoutLoopTest, TheEndsOfTheRangeKeepAllAndNothing) {
  const std::vector<float> x(200, 3.0F);
  EXPECT_EQ(run(x, 0, 0), x);
  EXPECT_EQ(run(x, 0, 1), std::vector<float>(200, 0.0F));
}

// Dropping must not hide that something went wrong before.
TEST(DropoutLoopTest, NaNStaysNaN) {
  const std::vector<float> x(100, std::numeric_limits<float>::quiet_NaN());
  for (const float y : run(x, 0, 0.5)) EXPECT_TRUE(std::isnan(y));
  std::vector<uint16_t> half(100, 0x7fc0);
  apply_dropout(half.data(), half.data(), DType::kBF16, 0, 100, kKey, 0.5);
  for (const uint16_t bits : half) EXPECT_TRUE(std::isnan(bf16_to_float(bits)));
}

TEST(DropoutLoopTest, RefusesOtherTypes) {
  double x = 1;
  EXPECT_THROW(apply_dropout(&x, &x, DType::kF64, 0, 1, kKey, 0.5), InternalError);
}

}  // namespace
}  // namespace fsdp
