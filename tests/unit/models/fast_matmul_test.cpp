#include "libfsdp/models/fast_matmul.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "libfsdp/models/loss.h"

namespace fsdp::models {
namespace {

double relative_error(const at::Tensor& got, const at::Tensor& expected) {
  return (got.to(at::kDouble) - expected).norm().item<double>() / expected.norm().item<double>();
}

// Rounding to bfloat16 would give errors of 1e-3.
TEST(FastMatmulTest, KeepsFullFloatPrecision) {
  use_fast_float32_matmul();
  at::manual_seed(11);
  for (const int64_t k : {64, 576, 1536}) {
    const at::Tensor a = at::randn({256, k}), b = at::randn({192, k}), g = at::randn({256, 192});
    const auto wide = [](const at::Tensor& t) { return t.to(at::kDouble); };
    EXPECT_LE(relative_error(at::mm(a, b.t()), at::mm(wide(a), wide(b).t())), 1e-6) << k;
    EXPECT_LE(relative_error(at::mm(g, b), at::mm(wide(g), wide(b))), 1e-6) << k;
    EXPECT_LE(relative_error(at::mm(g.t(), a), at::mm(wide(g).t(), wide(a))), 1e-6) << k;
  }
}

TEST(FastMatmulTest, TheLossInBlocksOfTheVocabularyStaysTheSame) {
  at::manual_seed(12);
  const at::Tensor h = at::randn({130, 64}) / 4, w = at::randn({13000, 64});
  const at::Tensor rows = at::arange(130, at::kLong),
                   targets = at::randint(13000, {130}, at::kLong);
  const auto run = [&] {
    const at::Tensor x = h.clone().requires_grad_(), y = w.clone().requires_grad_();
    const at::Tensor loss = linear_cross_entropy(x, y, rows, targets);
    loss.backward();
    return std::vector<at::Tensor>{loss.detach(), x.grad(), y.grad()};
  };
  const std::vector<at::Tensor> before = run();
  use_fast_float32_matmul();
  const std::vector<at::Tensor> after = run();
  for (size_t i = 0; i < before.size(); ++i) {
    EXPECT_LE(relative_error(after[i], before[i].to(at::kDouble)), 3e-6) << i;
  }
}

}  // namespace
}  // namespace fsdp::models
