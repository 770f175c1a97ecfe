#include "libfsdp/models/generate.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "libfsdp/base/error.h"

namespace fsdp::models {
namespace {

std::shared_ptr<KvCache> cache_of(int64_t capacity) {
  LlamaConfig config;
  config.num_hidden_layers = config.num_key_value_heads = 1;
  config.head_dim = 2;
  return std::make_shared<KvCache>(config, capacity, at::kFloat);
}

/// A model that continues n with n + 1 (mod 10).
at::Tensor count_up(const at::Tensor& ids, const std::shared_ptr<KvCache>& cache) {
  cache->append(ids.numel());
  at::Tensor logits = at::zeros({10});
  logits[(ids[-1].item<int64_t>() + 1) % 10] = 5.0;
  return logits;
}

const std::vector<int64_t> kPrompt{4, 5};

TEST(GenerateTest, ContinuesThePromptGreedily) {
  EXPECT_EQ(generate(count_up, cache_of(16), kPrompt, {.max_new_tokens = 4}),
            std::vector<int64_t>({6, 7, 8, 9}));
}

TEST(GenerateTest, EndsWithAStopTokenOrWhenTheCallbackSaysSo) {
  EXPECT_EQ(generate(count_up, cache_of(16), kPrompt, {.stop_ids = {8, 99}}),
            std::vector<int64_t>({6, 7, 8}));
  std::vector<int64_t> seen;
  const auto callback = [&](int64_t token) {
    seen.push_back(token);
    return seen.size() < 2;
  };
  EXPECT_EQ(generate(count_up, cache_of(16), kPrompt, {}, callback), seen);
  EXPECT_EQ(seen, std::vector<int64_t>({6, 7}));
}

TEST(GenerateTest, RefusesAnEmptyPromptBadOptionsAndAFullCache) {
  EXPECT_THROW(generate(count_up, cache_of(16), {}, {}), DataError);
  EXPECT_THROW(generate(count_up, cache_of(16), kPrompt, {.temperature = -1}), ConfigError);
  EXPECT_THROW(generate(count_up, cache_of(16), kPrompt, {.top_p = 0}), ConfigError);
  EXPECT_THROW(generate(count_up, cache_of(4), kPrompt, {}), ModelError);
}

TEST(PickTokenTest, GreedyTakesTheFirstOfEqualLogits) {
  EXPECT_EQ(pick_token(at::tensor({1.0F, 3.0F, 3.0F}), {}, 0), 1);
}

TEST(PickTokenTest, SamplesWithTheProbabilitiesOfTheSoftmax) {
  const at::Tensor logits = at::tensor({0.1F, 0.6F, 0.3F}).log();
  std::map<int64_t, int> counts;
  for (int64_t i = 0; i < 20000; ++i)
    ++counts[pick_token(logits, {.temperature = 1, .seed = 3}, i)];
  EXPECT_NEAR(counts[0] / 20000.0, 0.1, 0.012);
  EXPECT_NEAR(counts[1] / 20000.0, 0.6, 0.02);
}

TEST(PickTokenTest, TemperatureTopKAndTopPNarrowTheChoice) {
  const at::Tensor logits = at::tensor({0.1F, 0.6F, 0.3F}).log();
  const auto chosen = [&](GenerateOptions options) {
    std::set<int64_t> tokens;
    for (int64_t i = 0; i < 2000; ++i) tokens.insert(pick_token(logits, options, i));
    return tokens;
  };
  EXPECT_EQ(chosen({.temperature = 1}), std::set<int64_t>({0, 1, 2}));
  EXPECT_EQ(chosen({.temperature = 1, .top_k = 2}), std::set<int64_t>({1, 2}));
  EXPECT_EQ(chosen({.temperature = 1, .top_k = 1}), std::set<int64_t>({1}));
  EXPECT_EQ(chosen({.temperature = 1, .top_p = 0.5}), std::set<int64_t>({1}));
  EXPECT_EQ(chosen({.temperature = 1, .top_p = 0.7}), std::set<int64_t>({1, 2}));
  EXPECT_EQ(chosen({.temperature = 0.01}), std::set<int64_t>({1}));
}

TEST(PickTokenTest, IsAPureFunctionOfSeedAndIndex) {
  const at::Tensor logits = at::zeros({1000});
  const GenerateOptions a{.temperature = 1, .seed = 1}, b{.temperature = 1, .seed = 2};
  EXPECT_EQ(pick_token(logits, a, 5), pick_token(logits, a, 5));
  EXPECT_NE(pick_token(logits, a, 5), pick_token(logits, a, 6));
  EXPECT_NE(pick_token(logits, a, 5), pick_token(logits, b, 5));
}

TEST(PickTokenTest, RefusesLogitsThatAreNotNumbers) {
  EXPECT_THROW(pick_token(at::full({3}, NAN), {}, 0), NumericsError);
}

}  // namespace
}  // namespace fsdp::models
