#include "libfsdp/models/llama.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "libfsdp/base/error.h"
#include "libfsdp/models/init.h"
#include "libfsdp/models/registry.h"

namespace fsdp::models {
namespace {

LlamaConfig tiny(bool tied) {
  LlamaConfig c;
  c.vocab_size = 97;
  c.hidden_size = 32;
  c.intermediate_size = 80;
  c.num_hidden_layers = 2;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 8;
  c.tie_word_embeddings = tied;
  return c;
}

LlamaForCausalLM filled(const LlamaConfig& config, at::ScalarType dtype = at::kFloat) {
  LlamaForCausalLM model = make_causal_lm(config);
  const at::NoGradGuard no_grad;
  for (const auto& p : model->named_parameters()) {
    random_init(p.key(), 0,
                {p.value().mutable_data_ptr<float>(), static_cast<size_t>(p.value().numel())}, 1,
                0.3);
  }
  model->to(dtype);
  return model;
}

at::Tensor some_ids(std::vector<int64_t> shape) {
  at::manual_seed(3);
  return at::randint(97, shape, at::kLong);
}

CausalLmBatch batch_of(const at::Tensor& ids, const std::vector<DocumentSpan>& documents) {
  const std::span<const int64_t> numbers(ids.const_data_ptr<int64_t>(),
                                         static_cast<size_t>(ids.numel()));
  return make_batch(ids.size(0), ids.size(1), numbers, numbers, {}, documents);
}

TEST(LlamaTest, ParametersAreThoseOfTheFiles) {
  for (const bool flag : {false, true}) {
    LlamaConfig config = tiny(flag);
    config.qkv_bias = config.mlp_bias = config.qk_norm = flag;
    const auto model = make_causal_lm(config, at::TensorOptions(at::kMeta).dtype(at::kBFloat16));
    const std::vector<io::NamedShape> expected = config.expected_tensors();
    const auto parameters = model->named_parameters();
    ASSERT_EQ(parameters.size(), expected.size());
    for (const io::NamedShape& e : expected) {
      const at::Tensor* p = parameters.find(e.name);
      ASSERT_NE(p, nullptr) << e.name;
      EXPECT_EQ(p->sizes().vec(), e.shape) << e.name;
      EXPECT_TRUE(p->is_meta());
      EXPECT_EQ(p->scalar_type(), at::kBFloat16);
    }
    EXPECT_TRUE(model->named_buffers().is_empty());
  }
}

TEST(LlamaTest, RefusesAConfigurationThatMakesNoModel) {
  LlamaConfig config = tiny(false);
  config.num_key_value_heads = 3;
  EXPECT_THROW(make_causal_lm(config), ModelError);
  config = tiny(false);
  config.head_dim = 7;
  EXPECT_THROW(make_causal_lm(config), ModelError);
}

TEST(LlamaTest, PackedDocumentsHaveTheLossAndGradientsOfSeparateOnes) {
  const at::Tensor ids = some_ids({1, 90});
  auto packed = filled(tiny(true)), separate = filled(tiny(true));
  const at::Tensor loss = packed->loss(batch_of(ids, {{0, 0, 30}, {0, 30, 31}, {0, 31, 90}}));
  loss.backward();
  double sum = 0;
  for (const auto& [begin, end] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 30}, {30, 31}, {31, 90}}) {
    const at::Tensor part = ids.slice(1, begin, end).contiguous();
    const at::Tensor one = separate->loss(batch_of(part, {{0, 0, end - begin}}));
    one.backward();
    sum += one.item<double>();
  }
  EXPECT_NEAR(loss.item<double>(), sum, 1e-6 * sum);
  for (const auto& p : packed->named_parameters()) {
    const at::Tensor expected = separate->named_parameters()[p.key()].grad();
    EXPECT_LE((p.value().grad() - expected).norm().item<float>(),
              5e-6F * expected.norm().item<float>())
        << p.key();
  }
}

TEST(LlamaTest, PaddingOnTheRightChangesNothing) {
  auto model = filled(tiny(false));
  const at::NoGradGuard no_grad;
  const at::Tensor ids = some_ids({2, 40}), padded = at::constant_pad_nd(ids, {0, 9}, 0);
  const double expected = model->loss(batch_of(ids, {{0, 0, 40}, {1, 0, 40}})).item<double>();
  EXPECT_EQ(model->loss(batch_of(padded, {{0, 0, 40}, {1, 0, 40}})).item<double>(), expected);
  EXPECT_LE((model->logits(padded).slice(1, 0, 40) - model->logits(ids)).abs().max().item<float>(),
            2e-5F);
}

TEST(LlamaTest, ATiedWeightGetsBothGradientsAlsoIntoAPresetOne) {
  const at::Tensor ids = some_ids({2, 20});
  auto plain = filled(tiny(true)), preset = filled(tiny(true));
  plain->loss(make_batch(ids, ids)).backward();
  at::Tensor weight = preset->model->embed_tokens->weight;
  const at::Tensor slot = at::zeros_like(weight);
  weight.mutable_grad() = slot;
  preset->loss(make_batch(ids, ids)).backward();
  EXPECT_EQ(weight.grad().const_data_ptr(), slot.const_data_ptr());
  EXPECT_LE((plain->model->embed_tokens->weight.grad() - slot).norm().item<float>(),
            1e-6F * slot.norm().item<float>());
}

TEST(LlamaTest, BFloat16LossIsNearTheFloatOne) {
  const at::Tensor ids = some_ids({2, 70});
  auto wide = filled(tiny(true)), narrow = filled(tiny(true), at::kBFloat16);
  const at::Tensor loss = narrow->loss(make_batch(ids, ids));
  loss.backward();
  const double expected = wide->loss(make_batch(ids, ids)).item<double>();
  EXPECT_EQ(loss.scalar_type(), at::kFloat);
  EXPECT_NEAR(loss.item<double>(), expected, 0.01 * expected);
  for (const auto& p : narrow->named_parameters())
    EXPECT_EQ(p.value().grad().scalar_type(), at::kBFloat16);
}

TEST(LlamaTest, RefusesTokensOutsideTheVocabularyAndEmptyBatches) {
  auto model = filled(tiny(false));
  const at::Tensor ids = at::full({1, 3}, 97, at::kLong);
  EXPECT_THROW(model->logits(ids), DataError);
  EXPECT_THROW(model->loss(batch_of(ids, {})), DataError);
}

TEST(LlamaTest, BFloat16GeneratesFromItsCache) {
  auto model = filled(tiny(true), at::kBFloat16);
  const at::NoGradGuard no_grad;
  const at::Tensor ids = some_ids({12}), full = model->logits(ids.unsqueeze(0))[0].to(at::kFloat);
  auto cache = std::make_shared<KvCache>(model->config(), 12, at::kBFloat16);
  model->forward_cached(ids.narrow(0, 0, 10), cache);
  model->forward_cached(ids.narrow(0, 10, 1), cache);
  const at::Tensor last = model->forward_cached(ids.narrow(0, 11, 1), cache);
  EXPECT_LE((last - full[11]).abs().max().item<float>(),
            0.05F * full[11].abs().max().item<float>());
  EXPECT_THROW(model->forward_cached(ids.narrow(0, 0, 1), cache), ModelError);
}

}  // namespace
}  // namespace fsdp::models
