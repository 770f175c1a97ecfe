// Fused CPU operations against the composed ones in double precision, values and gradients.
#include "libfsdp/models/functions.h"
#include "libfsdp/shard/functions.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <vector>

#include "libfsdp/lora/functions.h"
#include "libfsdp/lora/linear_base.h"
#include "libfsdp/models/attention.h"
#include "libfsdp/models/rope.h"

namespace fsdp::models {
namespace {

using Op = std::function<at::Tensor(const std::vector<at::Tensor>&)>;

/// The result and the gradients of all inputs, for a fixed random cotangent.
std::vector<at::Tensor> run(const Op& op, const std::vector<at::Tensor>& inputs,
                            at::ScalarType dtype) {
  std::vector<at::Tensor> leaves;
  for (const at::Tensor& t : inputs)
    leaves.push_back(t.to(dtype).detach().clone().requires_grad_());
  const at::Tensor y = op(leaves);
  at::Tensor cotangent = at::linspace(-1, 1, y.numel(), at::kDouble).sin().view_as(y).to(dtype);
  std::vector<at::Tensor> results = torch::autograd::grad({y}, leaves, {cotangent});
  results.insert(results.begin(), y.detach());
  return results;
}

/// Largest difference of fused and composed, relative to the largest number of the tensor, or a
/// tenth of that of all: a gradient can be zero in exact arithmetic.
void expect_agreement(const Op& op, const std::vector<at::Tensor>& inputs, at::ScalarType dtype,
                      double bound) {
  std::vector<at::Tensor> rounded;
  for (const at::Tensor& t : inputs) rounded.push_back(t.to(dtype).to(at::kDouble));
  const std::vector<at::Tensor> fused = run(op, rounded, dtype),
                                composed = run(op, rounded, at::kDouble);
  double overall = 0;
  for (const at::Tensor& t : composed) overall = std::max(overall, t.abs().max().item<double>());
  for (size_t i = 0; i < fused.size(); ++i) {
    const double scale = std::max(composed[i].abs().max().item<double>(), 0.1 * overall);
    EXPECT_LE((fused[i].to(at::kDouble) - composed[i]).abs().max().item<double>(), bound * scale)
        << "tensor " << i;
  }
}

constexpr double kFloatBound = 2e-6;
constexpr double kBFloat16Bound = 0.02;  // a few roundings of 2^-9

class FunctionsTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { at::manual_seed(5); }
};

TEST_P(FunctionsTest, RmsNormEqualsComposed) {
  const Op op = [](const auto& in) { return rms_norm(in[0], in[1], 1e-5); };
  const std::vector<at::Tensor> inputs{at::randn({131, GetParam()}) * 3, at::randn({GetParam()})};
  expect_agreement(op, inputs, at::kFloat, kFloatBound);
  expect_agreement(op, inputs, at::kBFloat16, kBFloat16Bound);
}

TEST_P(FunctionsTest, NormLinearsEqualComposed) {
  for (const bool biased : {false, true}) {
    const Op op = [&](const auto& in) {
      const std::vector<at::Tensor> weights{in[2], in[3], in[4]};
      const std::vector<at::Tensor> biases =
          biased ? std::vector<at::Tensor>{in[5], in[6], in[7]} : std::vector<at::Tensor>{};
      return at::cat(norm_linears(in[0], in[1], 1e-5, weights, biases), 1);
    };
    const int64_t width = GetParam();
    std::vector<at::Tensor> inputs{at::randn({131, width}) * 3, at::randn({width})};
    for (const int64_t out : {24, 8, 9}) inputs.push_back(at::randn({out, width}));
    if (biased) {
      for (const int64_t out : {24, 8, 9}) inputs.push_back(at::randn({out}));
    }
    expect_agreement(op, inputs, at::kFloat, kFloatBound);
    expect_agreement(op, inputs, at::kBFloat16, 2 * kBFloat16Bound);  // sums of three, rounded
  }
}

TEST(NormLinearsTest, GivesGradientsToTrainableOnesAlone) {
  at::manual_seed(5);
  const at::Tensor x = at::randn({20, 12}), norm = at::randn({12}), frozen = at::randn({6, 12}),
                   trained = at::randn({4, 12}).requires_grad_();
  const auto results = norm_linears(x, norm, 1e-5, {frozen, trained});
  at::cat(results, 1).sum().backward();
  const at::Tensor y = rms_norm(x, norm, 1e-5);
  EXPECT_TRUE(results[0].detach().allclose(y.mm(frozen.t())));
  EXPECT_TRUE(trained.grad().allclose(y.sum(0).expand({4, 12}), 1e-5, 1e-5));
  EXPECT_FALSE(frozen.grad().defined() || norm.grad().defined() || x.grad().defined());
}

TEST_P(FunctionsTest, SwigluEqualsComposed) {
  const Op op = [](const auto& in) { return swiglu(in[0], in[1]); };
  const std::vector<at::Tensor> inputs{at::randn({7, GetParam()}) * 20, at::randn({7, GetParam()})};
  expect_agreement(op, inputs, at::kFloat, kFloatBound);
  expect_agreement(op, inputs, at::kBFloat16, kBFloat16Bound);
}

// An adapter in plain formulas; norm_linears and swiglu_linear take it for what it says it is.
class PlainAdapter : public lora::LinearBase {
 public:
  explicit PlainAdapter(lora::LowRank low_rank) : low_rank_(std::move(low_rank)) {}
  at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                    const at::Tensor& bias) override {
    return at::linear(x, weight, bias) +
           at::linear(at::linear(x, low_rank_.a), low_rank_.b) * low_rank_.scaling;
  }
  at::Tensor embedding(const at::Tensor&, const at::Tensor&, int64_t, bool) override { return {}; }
  at::Tensor convolve(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                      const Convolution&) override {
    return {};
  }
  at::Tensor matrix(const at::Tensor&, const std::string&) override { return {}; }
  std::optional<lora::LowRank> plain_adapter() const override { return low_rank_; }

 private:
  lora::LowRank low_rank_;
};

at::Tensor adapted(const at::Tensor& weight, const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor frozen = weight.detach();
  set_weight_adapter(frozen, std::make_shared<PlainAdapter>(lora::LowRank{a, b, 1.7}));
  return frozen;
}

TEST_P(FunctionsTest, AdaptedLinearsEqualComposed) {
  const int64_t width = GetParam();
  const at::Tensor w0 = at::randn({24, width}), w1 = at::randn({9, width}), c = at::randn({24}),
                   c1 = at::randn({9}), c2 = at::randn({8});
  const Op norm = [&](const auto& in) {
    const auto type = in[0].scalar_type();
    const std::vector<at::Tensor> weights{adapted(w0.to(type), in[2], in[3]), in[6],
                                          adapted(w1.to(type), in[4], in[5])};
    return at::cat(
        norm_linears(in[0], in[1], 1e-5, weights, {c.to(type), c2.to(type), c1.to(type)}), 1);
  };
  const std::vector<at::Tensor> inputs{
      at::randn({131, width}) * 3, at::randn({width}), at::randn({4, width}), at::randn({24, 4}),
      at::randn({2, width}),       at::randn({9, 2}),  at::randn({8, width})};
  expect_agreement(norm, inputs, at::kFloat, kFloatBound);
  const Op swiglu = [&](const auto& in) {
    const auto type = in[0].scalar_type();
    return swiglu_linear(in[0], in[1], adapted(w0.to(type), in[2], in[3]), c.to(type));
  };
  expect_agreement(swiglu, {at::randn({7, width}), at::randn({7, width}), inputs[2], inputs[3]},
                   at::kFloat, kFloatBound);
}

// One operation for several layers sums gradients in the order in which autograd sums those of
// layers apart.
TEST_P(FunctionsTest, AdaptedLinearsHaveTheBitsOfLayersApart) {
  const int64_t width = GetParam();
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const auto leaf = [&](at::IntArrayRef sizes) {
      return at::randn(sizes).to(type).set_requires_grad(true);
    };
    const at::Tensor w0 = at::randn({24, width}).to(type), w1 = at::randn({9, width}).to(type),
                     w2 = at::randn({8, width}).to(type), bias = at::randn({24}).to(type);
    const std::vector<at::Tensor> leaves{leaf({37, width}), leaf({width}),    leaf({4, width}),
                                         leaf({24, 4}),     leaf({2, width}), leaf({9, 2})};
    const auto results_and_gradients = [&](bool apart) {
      const auto &x = leaves[0], &norm = leaves[1];
      std::vector<at::Tensor> all;
      if (apart) {
        const at::Tensor y = rms_norm(x, norm, 1e-5);
        all = {lora::lora_linear(y, {}, {w0, nullptr}, bias, {leaves[2], leaves[3], 1.7}),
               lora::frozen_linear(y, {w2, nullptr}, {}),
               lora::lora_linear(y, {}, {w1, nullptr}, {}, {leaves[4], leaves[5], 1.7})};
      } else {
        all =
            norm_linears(x, norm, 1e-5,
                         {adapted(w0, leaves[2], leaves[3]), w2, adapted(w1, leaves[4], leaves[5])},
                         {bias, at::Tensor(), at::Tensor()});
      }
      const at::Tensor sum = at::cat(all, 1);
      const at::Tensor weights = at::linspace(-1, 1, sum.numel()).view_as(sum).to(type);
      const auto gradients = torch::autograd::grad({sum}, leaves, {weights});
      all.insert(all.end(), gradients.begin(), gradients.end());
      return all;
    };
    const auto fused = results_and_gradients(false), plain = results_and_gradients(true);
    for (size_t i = 0; i < fused.size(); ++i)
      EXPECT_TRUE(at::equal(fused[i], plain[i])) << i << " in " << type;
  }
}

TEST(LinearsTest, AWeightThatChangedBeforeItsBackwardIsAnError) {
  const at::Tensor x = at::randn({5, 6}), a = at::randn({2, 6}).set_requires_grad(true),
                   b = at::randn({4, 2}).set_requires_grad(true);
  const at::Tensor y = norm_linears(x, at::ones({6}), 1e-5, {adapted(at::randn({4, 6}), a, b)})[0];
  {
    const at::NoGradGuard no_graph;
    b.mul_(0.5);
  }
  EXPECT_THROW(y.sum().backward(), c10::Error);
}

INSTANTIATE_TEST_SUITE_P(Widths, FunctionsTest, testing::Values(2, 15, 16, 64, 80, 577));

struct AttentionCase {
  AttentionShape shape;
  std::vector<int64_t> lengths;
  int64_t prefix = 0;
};

class AttentionTest : public testing::TestWithParam<AttentionCase> {};

TEST_P(AttentionTest, EqualsComposed) {
  at::manual_seed(6);
  const AttentionShape shape = GetParam().shape;
  AttentionSpans spans;
  std::vector<at::Tensor> positions;
  for (const int64_t n : GetParam().lengths) {
    spans.spans.push_back({spans.tokens(), spans.tokens() + n});
    positions.push_back(at::arange(n, at::kLong));
  }
  RopeTable table(RopeConfig{}, shape.head_dim);
  const auto [cos, sin] = table.lookup(at::cat(positions));
  const Op op = [&, c = cos, s = sin](const auto& in) {
    return causal_attention(in[0], in[1], in[2], c, s, spans, shape,
                            in.size() > 3 ? in[3] : at::Tensor());
  };
  const int64_t n = spans.tokens(), q = shape.num_heads * shape.head_dim,
                kv = shape.num_kv_heads * shape.head_dim;
  std::vector<at::Tensor> inputs{at::randn({n, q}) * 2, at::randn({n, kv}) * 2, at::randn({n, kv})};
  if (const int64_t prefix = GetParam().prefix) inputs.push_back(at::randn({2, prefix, kv}) * 2);
  expect_agreement(op, inputs, at::kFloat, 5e-6);
  expect_agreement(op, inputs, at::kBFloat16, kBFloat16Bound);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, AttentionTest,
    testing::Values(AttentionCase{{4, 2, 16}, {1}}, AttentionCase{{4, 2, 16}, {64}},
                    AttentionCase{{3, 1, 64}, {65, 1, 130}}, AttentionCase{{2, 2, 6}, {63, 128}},
                    AttentionCase{{9, 3, 64}, {256}}, AttentionCase{{2, 1, 80}, {700}},
                    AttentionCase{{4, 2, 16}, {1}, 1}, AttentionCase{{3, 1, 64}, {65, 1, 130}, 30},
                    AttentionCase{{4, 4, 6}, {63, 128}, 7}));

TEST(AttentionTest, LaterTokensAndOtherDocumentsDoNotMatter) {
  at::manual_seed(7);
  const AttentionShape shape{2, 1, 16};
  AttentionSpans spans;
  spans.spans = {{0, 80}, {80, 150}};
  RopeTable table(RopeConfig{}, 16);
  const auto [cos, sin] =
      table.lookup(at::cat({at::arange(80, at::kLong), at::arange(70, at::kLong)}));
  const at::Tensor q = at::randn({150, 32}), k = at::randn({150, 16}), v = at::randn({150, 16});
  const at::Tensor before = causal_attention(q, k, v, cos, sin, spans, shape);
  k.narrow(0, 40, 40).fill_(1e30F);
  v.narrow(0, 40, 40).fill_(1e30F);
  const at::Tensor after = causal_attention(q, k, v, cos, sin, spans, shape);
  EXPECT_TRUE(after.narrow(0, 0, 40).equal(before.narrow(0, 0, 40)));
  EXPECT_TRUE(after.narrow(0, 80, 70).equal(before.narrow(0, 80, 70)));
}

TEST(EmbeddingTest, GradientIsTheSameDenseAndSparse) {
  at::manual_seed(8);
  const at::Tensor table = at::randn({50, 12}), ids = at::randint(50, {200}, at::kLong),
                   g = at::randn({200, 12});
  const auto gradient = [&](bool preset, at::Tensor weight) {
    if (preset) weight.mutable_grad() = at::zeros_like(weight);
    const at::Tensor slot = weight.grad();
    fsdp::embedding(weight, ids, false).backward(g);
    EXPECT_FALSE(weight.grad().is_sparse());
    EXPECT_TRUE(!preset || weight.grad().const_data_ptr() == slot.const_data_ptr());
    return weight.grad();
  };
  const at::Tensor dense = gradient(false, table.clone().requires_grad_());
  const at::Tensor added = gradient(true, table.clone().requires_grad_());
  EXPECT_LE((dense - added).abs().max().item<float>(), 1e-5F);
  EXPECT_GT(dense.abs().max().item<float>(), 1.0F);
}

}  // namespace
}  // namespace fsdp::models
