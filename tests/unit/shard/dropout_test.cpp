#include "libfsdp/shard/dropout.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/pooling.h>
#include <torch/nn/modules/rnn.h>
#include <torch/nn/modules/transformerlayer.h>
#include <torch/utils.h>

#include <cmath>
#include <sstream>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/random.h"

namespace fsdp {
namespace {

namespace nn = torch::nn;

at::Tensor at_site(const at::Tensor& x, double p) {
  const RandomScope::Root root(3, 1, 0, 0);
  return fsdp::dropout(x, p);
}

TEST(DropoutTest, GradientIsTheMaskOfTheForward) {
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    const at::Tensor x = at::rand({37, 19}).add(1).to(type).requires_grad_();
    const at::Tensor seed = at::rand({37, 19}).add(1).to(type);
    at::Tensor y;
    {
      const RandomScope::Root root(3, 1, 0, 0);
      y = fsdp::dropout(x, 0.25);
      fsdp::dropout(x, 0.25);  // Later calls do not move the mask of this one.
    }
    y.backward(seed);
    const auto wide = type == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor factors = y.detach().ne(0).to(wide) / 0.75;
    EXPECT_TRUE(at::equal(x.grad(), (seed.to(wide) * factors).to(type))) << type;
    EXPECT_TRUE(at::equal(y, (x.to(wide) * factors).to(type))) << type;
  }
}

TEST(DropoutTest, AllTypesAndLayoutsTakeTheSameMask) {
  const at::Tensor ones = at::ones({12, 35});
  const at::Tensor truth = at_site(ones, 0.4).ne(0);
  for (const auto type : {at::kDouble, at::kBFloat16, at::kHalf})
    EXPECT_TRUE(at::equal(at_site(ones.to(type), 0.4).ne(0), truth)) << type;
  // By the index in the tensor, not by the place in memory.
  EXPECT_TRUE(at::equal(at_site(at::ones({35, 12}).t(), 0.4).ne(0), truth));
  EXPECT_TRUE(at::equal(at_site(at::ones({12, 1}).expand({12, 35}), 0.4).ne(0), truth));
}

TEST(DropoutTest, TheNumberOfThreadsDoesNotMatter) {
  const int threads = at::get_num_threads();
  const at::Tensor x = at::rand({300, 700});
  at::set_num_threads(1);
  const at::Tensor truth = at_site(x, 0.5);
  at::set_num_threads(4);
  EXPECT_TRUE(at::equal(at_site(x, 0.5), truth));
  at::set_num_threads(threads);
}

TEST(DropoutTest, IsTheIdentityInEvaluationAndForZero) {
  const at::Tensor x = at::rand({5});
  EXPECT_TRUE(fsdp::dropout(x, 0.5, false).is_same(x));
  EXPECT_TRUE(fsdp::dropout(x, 0).is_same(x));
  EXPECT_TRUE(at::equal(fsdp::dropout(x, 1), at::zeros({5})));
  EXPECT_EQ(fsdp::dropout(at::empty({0, 3}), 0.5).sizes(), at::IntArrayRef({0, 3}));
  EXPECT_GE(fsdp::dropout(at::ones({}), 0.5).item<float>(), 0);
}

TEST(DropoutTest, HasASecondDerivative) {
  at::Tensor x = at::rand({50}).add(1).requires_grad_();
  at::Tensor y;
  {
    const RandomScope::Root root(3, 1, 0, 0);
    y = fsdp::dropout(x, 0.5);
  }
  const at::Tensor factors = y.detach().ne(0).to(at::kFloat) * 2;
  // d/dx of sum((2 y f)^2) with y = f x is 8 f^4 x.
  const auto first =
      torch::autograd::grad({y.square().sum()}, {x}, {}, true, /*create_graph=*/true);
  first[0].square().sum().backward();
  EXPECT_TRUE(at::allclose(x.grad(), 8 * factors.pow(4) * x.detach(), 1e-6));
}

TEST(DropoutTest, FollowsManualSeedOutsideOfAModel) {
  const at::Tensor x = at::ones({1000});
  torch::manual_seed(1);
  const at::Tensor first = fsdp::dropout(x, 0.5), second = fsdp::dropout(x, 0.5);
  torch::manual_seed(1);
  EXPECT_TRUE(at::equal(fsdp::dropout(x, 0.5), first));
  EXPECT_FALSE(at::equal(first, second));
}

TEST(DropoutTest, RefusesWhatIsNoProbabilityAndNoNumber) {
  EXPECT_THROW(fsdp::dropout(at::ones({2}), 1.5), ConfigError);
  EXPECT_THROW(fsdp::dropout(at::ones({2}), -0.1), ConfigError);
  EXPECT_THROW(fsdp::dropout(at::ones({2}), std::nan("")), ConfigError);
  EXPECT_THROW(fsdp::dropout(at::ones({2}).to(at::kLong), 0.5), ConfigError);
  EXPECT_THROW(Dropout(2.0), ConfigError);
  EXPECT_THROW(Dropout(nn::DropoutOptions(0.1).inplace(true)), ConfigError);
}

TEST(DropoutTest, TheModuleStandsInForTorchs) {
  nn::Sequential net(nn::Linear(4, 4), Dropout(0.5), Dropout(nn::DropoutOptions().p(0.25)),
                     Dropout());
  const at::Tensor x = at::rand({3, 4});
  torch::manual_seed(2);
  const at::Tensor trained = net->forward(x);
  net->eval();
  EXPECT_FALSE(at::equal(net->forward(x), trained));
  EXPECT_TRUE(at::equal(net->forward(x), net->forward(x)));
  std::ostringstream text;
  text << *Dropout(0.125);
  EXPECT_EQ(text.str(), "fsdp::Dropout(p=0.125)");
}

std::string refusal(const nn::Module& model) {
  try {
    refuse_stock_dropout(model);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

TEST(RefuseStockDropoutTest, NamesEveryLayerThatDraws) {
  nn::Sequential net;
  net->push_back("drop", nn::Dropout(0.1));
  net->push_back("drop2", nn::Dropout2d(0.1));
  net->push_back("drop3", nn::Dropout3d(0.1));
  net->push_back("alpha", nn::AlphaDropout(0.1));
  net->push_back("feature", nn::FeatureAlphaDropout(0.1));
  net->push_back("lstm", nn::LSTM(nn::LSTMOptions(2, 2).num_layers(2).dropout(0.1)));
  net->push_back("gru", nn::GRU(nn::GRUOptions(2, 2).num_layers(2).dropout(0.1)));
  net->push_back("rnn", nn::RNN(nn::RNNOptions(2, 2).num_layers(2).dropout(0.1)));
  net->push_back("attention",
                 nn::MultiheadAttention(nn::MultiheadAttentionOptions(4, 2).dropout(0.1)));
  net->push_back("rrelu", nn::RReLU());
  net->push_back("pool", nn::FractionalMaxPool2d(nn::FractionalMaxPool2dOptions(2).output_size(2)));
  const std::string text = refusal(*net);
  for (const auto& child : net->named_children()) {
    EXPECT_NE(text.find("'" + child.key() + "'"), std::string::npos) << child.key() << ": " << text;
  }
  EXPECT_NE(text.find("fsdp::dropout"), std::string::npos);
}

TEST(RefuseStockDropoutTest, FindsThemInsideOfATransformersLayer) {
  nn::TransformerEncoderLayer layer(nn::TransformerEncoderLayerOptions(4, 2).dropout(0.1));
  EXPECT_NE(refusal(*layer).find("self_attn"), std::string::npos);
  EXPECT_EQ(
      refusal(*nn::TransformerEncoderLayer(nn::TransformerEncoderLayerOptions(4, 2).dropout(0.0))),
      "");
}

TEST(RefuseStockDropoutTest, LetsWhatDrawsNothingPass) {
  nn::Sequential net;
  net->push_back(nn::Linear(4, 4));
  net->push_back(Dropout(0.5));
  net->push_back(nn::Dropout(0.0));
  net->push_back(nn::LSTM(nn::LSTMOptions(2, 2).num_layers(1).dropout(0.1)));
  net->push_back(nn::LSTM(2, 2));
  net->push_back(nn::MultiheadAttention(4, 2));
  EXPECT_EQ(refusal(*net), "");
}

}  // namespace
}  // namespace fsdp
