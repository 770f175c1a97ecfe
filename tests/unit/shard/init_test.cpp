#include "libfsdp/shard/init.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/adaptive.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/instancenorm.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/modules/rnn.h>
#include <torch/nn/modules/transformer.h>
#include <torch/nn/modules/transformercoder.h>
#include <torch/nn/modules/transformerlayer.h>

#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "libfsdp/base/error.h"

namespace fsdp {
namespace {

namespace nn = torch::nn;

std::vector<float> values_of(const FillFunction& fill, const std::string& name,
                             at::IntArrayRef shape, int64_t begin, int64_t n) {
  std::vector<float> values(static_cast<size_t>(n));
  fill(name, shape, begin, values);
  return values;
}

TEST(InitTest, DependsOnSeedAndNameAndNotOnTheCut) {
  const std::vector<int64_t> shape = {30, 20};
  for (const auto make :
       {+[](uint64_t seed) { return init::normal(seed, 0.02); },
        +[](uint64_t seed) { return init::uniform(seed, -1, 1); },
        +[](uint64_t seed) { return init::truncated_normal(seed, 1); }, init::kaiming_uniform}) {
    const std::vector<float> whole = values_of(make(1), "a.weight", shape, 0, 600);
    std::vector<float> joined = values_of(make(1), "a.weight", shape, 0, 255);
    const std::vector<float> rest = values_of(make(1), "a.weight", shape, 255, 345);
    joined.insert(joined.end(), rest.begin(), rest.end());
    EXPECT_EQ(joined, whole);
    EXPECT_NE(values_of(make(2), "a.weight", shape, 0, 600), whole);
    EXPECT_NE(values_of(make(1), "b.weight", shape, 0, 600), whole);
  }
}

TEST(InitTest, KaimingUniformIsBoundedByTheFan) {
  const std::vector<int64_t> shape = {64, 10, 3, 3};  // fan_in = 90
  double most = 0;
  for (const float v : values_of(init::kaiming_uniform(1), "w", shape, 0, 5760))
    most = std::max<double>(most, std::fabs(v));
  const double bound = 1 / std::sqrt(90.0);
  // The largest of n uniform numbers lies 1 / n below the bound on average; 20 times as far has
  // probability e^-20.
  EXPECT_LE(most, bound);
  EXPECT_GE(most, bound * (1 - 20 / 5760.0));
  EXPECT_THROW(values_of(init::kaiming_uniform(1), "b", {5}, 0, 5), ConfigError);
}

struct Layer {
  const char* name;
  std::function<std::shared_ptr<nn::Module>()> make;
};

template <class Holder>
Layer layer(const char* name, Holder (*make)()) {
  return {name, [make] { return make().ptr(); }};
}

std::vector<Layer> layers() {
  return {
      layer(
          "linear", +[] { return nn::Linear(50, 80); }),
      layer(
          "bilinear", +[] { return nn::Bilinear(30, 20, 10); }),
      layer(
          "conv1", +[] { return nn::Conv1d(nn::Conv1dOptions(12, 24, 5)); }),
      layer(
          "conv2", +[] { return nn::Conv2d(nn::Conv2dOptions(12, 24, 3).groups(3)); }),
      layer(
          "conv3", +[] { return nn::Conv3d(nn::Conv3dOptions(6, 8, 3).bias(false)); }),
      layer(
          "transposed", +[] { return nn::ConvTranspose2d(nn::ConvTranspose2dOptions(12, 24, 3)); }),
      layer(
          "embedding", +[] { return nn::Embedding(nn::EmbeddingOptions(50, 40).padding_idx(7)); }),
      layer(
          "bag", +[] { return nn::EmbeddingBag(50, 40); }),
      layer(
          "layernorm",
          +[] {
            return nn::LayerNorm(nn::LayerNormOptions({20, 3}));
          }),
      layer(
          "groupnorm", +[] { return nn::GroupNorm(4, 20); }),
      layer(
          "batchnorm", +[] { return nn::BatchNorm2d(20); }),
      layer(
          "plain batchnorm",
          +[] { return nn::BatchNorm1d(nn::BatchNorm1dOptions(9).affine(false)); }),
      layer(
          "instancenorm",
          +[] { return nn::InstanceNorm2d(nn::InstanceNorm2dOptions(8).affine(true)); }),
      layer(
          "rnn", +[] { return nn::RNN(30, 25); }),
      layer(
          "lstm",
          +[] { return nn::LSTM(nn::LSTMOptions(30, 25).num_layers(2).bidirectional(true)); }),
      layer(
          "projected lstm", +[] { return nn::LSTM(nn::LSTMOptions(30, 25).proj_size(9)); }),
      layer(
          "gru", +[] { return nn::GRU(30, 25); }),
      layer(
          "lstm cell", +[] { return nn::LSTMCell(30, 25); }),
      layer(
          "prelu", +[] { return nn::PReLU(nn::PReLUOptions().num_parameters(7).init(0.1)); }),
      layer(
          "attention", +[] { return nn::MultiheadAttention(32, 4); }),
      layer(
          "mixed attention",
          +[] {
            return nn::MultiheadAttention(
                nn::MultiheadAttentionOptions(32, 4).kdim(20).vdim(24).add_bias_kv(true));
          }),
      layer(
          "encoder layer", +[] { return nn::TransformerEncoderLayer(32, 4); }),
      layer(
          "encoder", +[] { return nn::TransformerEncoder(nn::TransformerEncoderLayer(32, 4), 2); }),
      layer(
          "transformer",
          +[] { return nn::Transformer(nn::TransformerOptions(32, 4, 1, 1).dim_feedforward(40)); }),
      layer(
          "adaptive softmax",
          +[] {
            return nn::AdaptiveLogSoftmaxWithLoss(
                nn::AdaptiveLogSoftmaxWithLossOptions(32, 60, {10, 30}));
          }),
      layer(
          "sequential",
          +[] { return nn::Sequential(nn::Linear(5, 6), nn::ReLU(), nn::Linear(6, 2)); }),
  };
}

// Mean, root of the mean square and largest magnitude of two samples of one distribution. Of n
// numbers of deviation s a mean is off by s / sqrt(n), a mean square by at most s^2 sqrt(2 / n)
// (normal; uniform less), and two samples by sqrt(2) of that; six of these. The largest of a
// uniform sample lies below its bound by more than 20 / n of it with probability e^-20.
void expect_same_distribution(const at::Tensor& ours, const at::Tensor& stock, bool bounded) {
  const double n = static_cast<double>(stock.numel());
  const double square = stock.square().mean().item<double>();
  EXPECT_NEAR(ours.mean().item<double>(), stock.mean().item<double>(),
              6 * std::sqrt(2 * square / n));
  EXPECT_NEAR(ours.square().mean().item<double>(), square, 12 * square / std::sqrt(n));
  if (!bounded) return;
  EXPECT_NEAR(ours.abs().max().item<double>(), stock.abs().max().item<double>(),
              20 / n * stock.abs().max().item<double>());
}

TEST(DefaultInitializerTest, DrawsFromWhatEveryStockLayerDrawsFrom) {
  at::manual_seed(1);  // LibTorch seeds itself at random; one number in 2^24 is zero.
  for (const Layer& one : layers()) {
    SCOPED_TRACE(one.name);
    const auto module = one.make();
    const FillFunction fill = default_initializer(*module, 3);
    for (const auto& entry : module->named_parameters()) {
      SCOPED_TRACE(entry.key());
      const at::Tensor stock = entry.value().detach();
      const auto values = values_of(fill, entry.key(), stock.sizes(), 0, stock.numel());
      const at::Tensor ours = at::tensor(values).view(stock.sizes());
      if (stock.eq(stock.flatten()[0]).all().item<bool>()) {  // A constant.
        EXPECT_TRUE(at::equal(ours, stock));
        continue;
      }
      EXPECT_TRUE(at::equal(ours.eq(0), stock.eq(0)));  // The row of the padding index.
      const bool normal = one.name == std::string("embedding") || one.name == std::string("bag") ||
                          entry.key().starts_with("bias_");
      expect_same_distribution(ours, stock, !normal);
    }
  }
}

struct OwnImpl : nn::Module {
  OwnImpl() : layer(3, 4) {
    scale = register_parameter("scale", at::ones({4}));
    register_module("layer", layer);
  }
  at::Tensor scale;
  nn::Linear layer;
};
TORCH_MODULE(Own);

TEST(DefaultInitializerTest, AsksForParametersThatItDoesNotKnow) {
  const Own own;
  try {
    default_initializer(*own, 1);
    ADD_FAILURE();
  } catch (const ConfigError& error) {
    EXPECT_NE(std::string(error.what()).find("'scale'"), std::string::npos) << error.what();
    EXPECT_EQ(std::string(error.what()).find("'layer"), std::string::npos) << error.what();
  }
  const FillFunction fill = default_initializer(*own, 1, init::constant(0.5));
  EXPECT_EQ(values_of(fill, "scale", {4}, 0, 2), std::vector<float>({0.5F, 0.5F}));
  EXPECT_NE(values_of(fill, "layer.weight", {4, 3}, 0, 2), std::vector<float>({0.5F, 0.5F}));
}

}  // namespace
}  // namespace fsdp
