#include "libfsdp/models/init.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace fsdp::models {
namespace {

std::vector<float> numbers(std::string_view name, int64_t begin, size_t count, uint64_t seed = 7) {
  std::vector<float> out(count);
  random_init(name, begin, out, seed);
  return out;
}

TEST(RandomInitTest, DoesNotDependOnHowAParameterIsCut) {
  const std::vector<float> whole = numbers("model.layers.3.mlp.up_proj.weight", 0, 1001);
  for (const size_t cut : {1, 2, 333, 1000}) {
    std::vector<float> joined = numbers("model.layers.3.mlp.up_proj.weight", 0, cut);
    const std::vector<float> rest =
        numbers("model.layers.3.mlp.up_proj.weight", static_cast<int64_t>(cut), whole.size() - cut);
    joined.insert(joined.end(), rest.begin(), rest.end());
    EXPECT_EQ(joined, whole) << cut;
  }
}

TEST(RandomInitTest, WeightsAreNormalWithTheGivenDeviation) {
  const size_t n = 200000;
  const std::vector<float> values = numbers("lm_head.weight", 0, n);
  double sum = 0, squares = 0, neighbours = 0, beyond_two = 0;
  for (size_t i = 0; i < n; ++i) {
    sum += values[i];
    squares += std::pow(values[i], 2);
    if (i > 0) neighbours += values[i] * values[i - 1];
    beyond_two += std::fabs(values[i]) > 0.04F;
  }
  const double std_error = 1 / std::sqrt(static_cast<double>(n));
  EXPECT_NEAR(sum / n / 0.02, 0, 5 * std_error);
  EXPECT_NEAR(squares / n / 0.0004, 1, 5 * std::sqrt(2) * std_error);
  EXPECT_NEAR(neighbours / n / 0.0004, 0, 5 * std_error);
  EXPECT_NEAR(beyond_two / n, 0.0455, 0.0025);
}

TEST(RandomInitTest, SeedsAndNamesGiveOtherNumbers) {
  EXPECT_NE(numbers("a.weight", 0, 8, 1), numbers("a.weight", 0, 8, 2));
  EXPECT_NE(numbers("a.weight", 0, 8, 1), numbers("b.weight", 0, 8, 1));
}

TEST(RandomInitTest, NormsAreOnesAndBiasesZeros) {
  EXPECT_EQ(numbers("model.norm.weight", 0, 2), std::vector<float>({1, 1}));
  EXPECT_EQ(numbers("model.layers.0.input_layernorm.weight", 5, 2), std::vector<float>({1, 1}));
  EXPECT_EQ(numbers("model.layers.0.self_attn.q_norm.weight", 0, 2), std::vector<float>({1, 1}));
  EXPECT_EQ(numbers("model.layers.0.self_attn.q_proj.bias", 0, 2), std::vector<float>({0, 0}));
}

}  // namespace
}  // namespace fsdp::models
