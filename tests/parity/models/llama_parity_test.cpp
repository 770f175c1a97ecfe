// The family against transformers: logits, loss and every gradient of random tiny models (made by
// make_models.py).
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "libfsdp/io/hf_weights.h"
#include "libfsdp/models/registry.h"

namespace fsdp::models {
namespace {

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return at::kDouble;
    case DType::kI64:
      return at::kLong;
    default:
      return at::kFloat;
  }
}

at::Tensor read(const io::SafetensorsFile& file, const io::TensorEntry& entry) {
  at::Tensor tensor = at::empty(entry.shape, scalar_type(entry.dtype.value()));
  file.read(entry, 0,
            {static_cast<std::byte*>(tensor.mutable_data_ptr()), static_cast<size_t>(entry.bytes)});
  return tensor;
}

std::map<std::string, at::Tensor> read_all(const std::string& path) {
  const io::SafetensorsFile file = io::SafetensorsFile::open(path);
  std::map<std::string, at::Tensor> tensors;
  for (const io::TensorEntry& entry : file.entries()) tensors[entry.name] = read(file, entry);
  return tensors;
}

LlamaForCausalLM load(const std::string& directory) {
  LlamaForCausalLM model = make_causal_lm(io::HfModelConfig::read(directory));
  const io::HfWeights weights = io::HfWeights::open(directory);
  const at::NoGradGuard no_grad;
  for (const auto& item : model->named_parameters()) {
    const auto found = weights.find(item.key());
    if (!found) throw ModelError(cat("no tensor ", item.key(), " in ", directory));
    item.value().copy_(read(*found->file, *found->entry));
  }
  EXPECT_EQ(model->named_parameters().size(), weights.names().size());
  return model;
}

class LlamaParityTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    at::set_num_threads(1);
    const std::string directory = std::string(FSDP_ORACLE_DIR) + "/" + GetParam();
    oracle_ = read_all(directory + "/oracle.safetensors");
    model_ = load(directory);
  }
  std::map<std::string, at::Tensor> oracle_;
  LlamaForCausalLM model_{nullptr};
};

TEST_P(LlamaParityTest, LogitsEqualTransformers) {
  const at::NoGradGuard no_grad;
  const at::Tensor logits = model_->logits(oracle_.at("input_ids"));
  EXPECT_LE((logits - oracle_.at("logits")).abs().max().item<float>(), 2e-5F);
  EXPECT_LE((logits - oracle_.at("logits64")).abs().max().item<double>(), 2e-5);
}

TEST_P(LlamaParityTest, LossEqualsTransformers) {
  const at::NoGradGuard no_grad;
  const CausalLmBatch batch = make_batch(oracle_.at("input_ids"), oracle_.at("labels"));
  const double expected = oracle_.at("loss64").item<double>();
  EXPECT_NEAR(model_->loss(batch).item<float>(), expected, 5e-7 * expected);
}

// The yardstick for a gradient is how far transformers' own fp32 gradient is from fp64; two correct
// orders of summation differ by a few times that. Mathematically zero gradients (biases of k) leave
// rounding of the size of the others.
TEST_P(LlamaParityTest, GradientsEqualTransformers) {
  model_->loss(make_batch(oracle_.at("input_ids"), oracle_.at("labels"))).backward();
  double all = 0;
  for (const auto& item : model_->named_parameters())
    all += std::pow(oracle_.at("grad64." + item.key()).norm().item<double>(), 2);
  for (const auto& item : model_->named_parameters()) {
    const at::Tensor expected = oracle_.at("grad64." + item.key());
    const double spread = oracle_.at("spread." + item.key()).item<double>();
    ASSERT_TRUE(item.value().grad().defined()) << item.key();
    const double off = (item.value().grad().to(at::kDouble) - expected).norm().item<double>();
    EXPECT_LE(off, 4 * spread + 1e-8 * std::sqrt(all))
        << item.key() << ", norm " << expected.norm().item<double>();
  }
}

TEST_P(LlamaParityTest, DoublePrecisionTakesTheComposedPathAndAgrees) {
  const at::NoGradGuard no_grad;
  model_->to(at::kDouble);
  const at::Tensor logits = model_->logits(oracle_.at("input_ids"));
  // Rope is fp32 on both sides; transformers' norms are too even in a double model, ours are not.
  EXPECT_LE((logits - oracle_.at("logits64")).abs().max().item<double>(), 1e-5);
}

TEST_P(LlamaParityTest, CachedLogitsEqualFullOnes) {
  const at::NoGradGuard no_grad;
  const at::Tensor ids = oracle_.at("input_ids")[0], full = model_->logits(ids.unsqueeze(0))[0];
  auto cache = std::make_shared<KvCache>(model_->config(), ids.numel(), at::kFloat);
  const int64_t prompt = 70;
  const auto expect_last = [&](int64_t begin, int64_t count) {
    const at::Tensor last = model_->forward_cached(ids.narrow(0, begin, count), cache);
    EXPECT_LE((last - full[begin + count - 1]).abs().max().item<float>(), 2e-5F) << begin;
  };
  expect_last(0, prompt);
  for (int64_t i = prompt; i < 80; ++i) expect_last(i, 1);
  expect_last(80, 20);  // several tokens at once after the prompt
  for (int64_t i = 100; i < 110; ++i) expect_last(i, 1);
}

INSTANTIATE_TEST_SUITE_P(Transformers, LlamaParityTest,
                         testing::Values("llama_tied", "llama_untied", "llama_biases",
                                         "llama_head_40", "llama_rope_linear", "llama_rope_llama3",
                                         "mistral", "qwen2", "qwen3"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace fsdp::models
