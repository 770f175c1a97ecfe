#include "libfsdp/models/loss.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <cmath>

#include "libfsdp/base/error.h"

namespace fsdp::models {
namespace {

struct Case {
  int64_t tokens, width, vocabulary, trained;
};

struct Result {
  at::Tensor loss, d_hidden, d_weight;
};

class LossTest : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    at::manual_seed(9);
    const Case c = GetParam();
    hidden_ = at::randn({c.tokens, c.width}) / 2;
    weight_ = at::randn({c.vocabulary, c.width});
    rows_ = std::get<0>(at::randperm(c.tokens, at::kLong).narrow(0, 0, c.trained).sort());
    targets_ = at::randint(c.vocabulary, {c.trained}, at::kLong);
  }
  Result fused(at::ScalarType dtype, double scale) const {
    const at::Tensor h = hidden_.to(dtype).clone().requires_grad_(),
                     w = weight_.to(dtype).clone().requires_grad_();
    const at::Tensor loss = linear_cross_entropy(h, w, rows_, targets_);
    (loss * scale).backward();
    return {loss.detach(), h.grad(), w.grad()};
  }
  Result plain(double scale) const {
    const at::Tensor h = hidden_.to(at::kDouble).requires_grad_(),
                     w = weight_.to(at::kDouble).requires_grad_();
    const at::Tensor logits = h.index_select(0, rows_).matmul(w.t());
    const at::Tensor loss =
        at::nll_loss(at::log_softmax(logits, 1), targets_, {}, at::Reduction::Sum);
    (loss * scale).backward();
    return {loss.detach(), h.grad(), w.grad()};
  }
  static void expect_close(const at::Tensor& got, const at::Tensor& expected, double bound) {
    EXPECT_LE((got.to(at::kDouble) - expected).norm().item<double>(),
              bound * expected.norm().item<double>());
  }
  at::Tensor hidden_, weight_, rows_, targets_;
};

TEST_P(LossTest, EqualsLogSoftmaxInDouble) {
  for (const double scale : {1.0, 0.25}) {
    const Result got = fused(at::kFloat, scale), expected = plain(scale);
    EXPECT_EQ(got.loss.scalar_type(), at::kFloat);
    expect_close(got.loss, expected.loss, 1e-6);
    // A sum over the vocabulary; PyTorch's own is 2e-5 off at 140,000.
    const double summation = 6e-8 * std::sqrt(static_cast<double>(GetParam().vocabulary));
    expect_close(got.d_hidden, expected.d_hidden, 2e-6 + summation);
    expect_close(got.d_weight, expected.d_weight, 2e-6);
  }
}

TEST_P(LossTest, ComposedPathEqualsLogSoftmax) {
  const Result got = fused(at::kDouble, 0.5), expected = plain(0.5);
  expect_close(got.loss, expected.loss, 1e-12);
  expect_close(got.d_hidden, expected.d_hidden, 1e-12);
  expect_close(got.d_weight, expected.d_weight, 1e-12);
}

TEST_P(LossTest, BFloat16StaysNear) {
  const Result got = fused(at::kBFloat16, 1.0), expected = plain(1.0);
  EXPECT_EQ(got.loss.scalar_type(), at::kFloat);
  expect_close(got.loss, expected.loss, 5e-3);
  expect_close(got.d_hidden, expected.d_hidden, 3e-2);
  expect_close(got.d_weight, expected.d_weight, 3e-2);
}

TEST_P(LossTest, IsTheSameWithoutGradients) {
  const float with = fused(at::kFloat, 1.0).loss.item<float>();
  const at::NoGradGuard no_grad;
  EXPECT_EQ(linear_cross_entropy(hidden_, weight_, rows_, targets_).item<float>(), with);
}

// The last one has a vocabulary so large that its rows go in two blocks.
INSTANTIATE_TEST_SUITE_P(Sizes, LossTest,
                         testing::Values(Case{20, 8, 11, 20}, Case{100, 16, 6144, 37},
                                         Case{40, 24, 13001, 33}, Case{80, 8, 140000, 70}));

TEST(LinearCrossEntropyTest, WithoutTrainedTokensIsZeroWithZeroGradients) {
  const at::Tensor h = at::randn({5, 4}).requires_grad_(), w = at::randn({7, 4}).requires_grad_();
  const at::Tensor none = at::empty({0}, at::kLong);
  const at::Tensor loss = linear_cross_entropy(h, w, none, none);
  loss.backward();
  EXPECT_EQ(loss.item<float>(), 0);
  EXPECT_TRUE(h.grad().equal(at::zeros({5, 4})));
  EXPECT_TRUE(w.grad().equal(at::zeros({7, 4})));
}

TEST(LinearCrossEntropyTest, AFrozenWeightGetsNoGradientAndTheRowsTheSame) {
  at::manual_seed(9);  // More rows than one block of them.
  const at::Tensor x = at::randn({300, 8}), w = at::randn({50, 8}), rows = at::arange(300),
                   targets = at::randint(50, {300}, at::kLong);
  const auto gradient = [&](const at::Tensor& weight) {
    const at::Tensor h = x.clone().requires_grad_();
    (linear_cross_entropy(h, weight, rows, targets) * 0.5).backward();
    return h.grad();
  };
  const at::Tensor trained = w.clone().requires_grad_();
  EXPECT_TRUE(gradient(w).allclose(gradient(trained), 1e-5, 1e-6));
  EXPECT_FALSE(w.grad().defined());
  EXPECT_TRUE(trained.grad().defined());
}

TEST(LinearCrossEntropyTest, RefusesALabelOutsideTheVocabulary) {
  const at::Tensor h = at::randn({2, 4}), w = at::randn({7, 4});
  EXPECT_THROW(linear_cross_entropy(h, w, at::arange(2), at::arange(6, 8)), DataError);
}

TEST(LinearCrossEntropyTest, GradientBuffersAreGivenAwayNotCopied) {
  const at::Tensor h = at::randn({5, 4}), w = at::randn({7, 4}).requires_grad_();
  const at::Tensor loss = linear_cross_entropy(h, w, at::arange(5), at::arange(5));
  loss.backward({}, /*retain_graph=*/true);
  EXPECT_THROW(loss.backward(), std::exception);
}

}  // namespace
}  // namespace fsdp::models
