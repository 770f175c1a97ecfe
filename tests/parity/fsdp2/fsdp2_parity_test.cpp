// The engine against PyTorch FSDP2 itself: same weights, same batches, 20 steps of 2 micro-batches
// a rank, losses and gradient norms.
//
// fp32: to 1e-6, or 3 times FSDP2's own distance from the same run in fp64 up to that step, where
// rounding does more than that to this run (AdamW makes steps of gradients near zero). bf16: a
// product of bf16 carries 2^-9; logits of magnitude 1 make a token's loss uncertain by 2 x 2^-9,
// 1e-3 of these losses; and a norm, through some six roundings in a row, by 6 x 2^-9. Both average
// over tokens and elements, hence half of each.

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/io/hf_config.h"
#include "libfsdp/io/json.h"
#include "libfsdp/models/batch.h"
#include "libfsdp/models/registry.h"
#include "libfsdp/shard/sharded.h"
#include "libfsdp/shard/state.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

namespace nn = torch::nn;

constexpr int kSteps = 20, kAccumulation = 2, kClasses = 7;

// The models and batches of make_runs.py.
struct BlockImpl : nn::Module {
  BlockImpl(int64_t width, int64_t hidden)
      : norm(nn::LayerNormOptions({width})), up(width, hidden), down(hidden, width) {
    register_module("norm", norm);
    register_module("up", up);
    register_module("down", down);
  }
  at::Tensor forward(const at::Tensor& x) { return x + down(at::gelu(up(norm(x)))); }
  nn::LayerNorm norm;
  nn::Linear up, down;
};
TORCH_MODULE(Block);

struct MlpImpl : nn::Module {
  MlpImpl() : stem(13, 29), head(nn::LinearOptions(29, kClasses).bias(false)) {
    register_module("stem", stem);
    nn::ModuleList list;
    for (int i = 0; i < 5; ++i) {
      blocks.emplace_back(29, 51 + 2 * i);
      list->push_back(blocks.back());
    }
    register_module("blocks", list);
    register_module("head", head);
  }
  at::Tensor loss(const at::Tensor& input, const at::Tensor& targets) {
    at::Tensor x = stem(input.to(stem->weight.scalar_type()));
    for (auto& block : blocks) x = block->forward(x);
    return at::cross_entropy_loss(head(x).to(at::kFloat), targets, {}, at::Reduction::Sum);
  }
  nn::Linear stem, head;
  std::vector<Unit<Block>> blocks;
};
TORCH_MODULE(Mlp);

struct Loss {
  at::Tensor sum;
  int64_t terms;
};

Loss mlp_loss(Sharded<Mlp>& sharded, int step, int m) {
  const int64_t rows = 3 + (step + m) % 4;
  const at::Tensor i = at::arange(rows).unsqueeze(1), j = at::arange(13).unsqueeze(0);
  const at::Tensor x =
      ((i * 7 + j * 13 + (step * 31 + m * 17)).remainder(64) - 32).to(at::kFloat) / 32;
  const at::Tensor targets = (at::arange(rows) * 11 + (step * 5 + m * 3)).remainder(kClasses);
  return {sharded.run([&](auto& model) { return model.loss(x, targets); }), rows};
}

template <class Model>
Loss llama_loss(Model& sharded, int step, int m) {
  const int64_t length = 11 + (step + m) % 4;
  const at::Tensor row = at::arange(2).unsqueeze(1), place = at::arange(length).unsqueeze(0);
  const at::Tensor ids =
      (row * 29 + place * 7 + place * place + (step * 131 + m * 17)).remainder(97);
  at::Tensor labels = ids.clone();
  labels.narrow(1, 0, 2 + m % 3).fill_(-100);
  const auto batch = models::make_batch(ids, labels);
  return {sharded.run([&](auto& model) { return model.loss(batch); }), batch.trainable_tokens()};
}

struct Case {
  const char* model;
  const char* optimizer;
  int ranks;
  int shard_group;
  plan::Strategy strategy;
  bool checkpointing = false;
  DType dtype = DType::kF32;
};
std::string name_of(const Case& one) {
  return cat(one.model, "_", one.optimizer, "_", plan::strategy_name(one.strategy), "Ranks",
             one.ranks, one.checkpointing ? "Recompute" : "Keep", "_", dtype_name(one.dtype));
}
void PrintTo(const Case& one, std::ostream* out) { *out << name_of(one); }

bool is_adamw(const Case& one) { return one.optimizer == std::string("adamw"); }

ShardOptions options_of(const Case& one) {
  ShardOptions options;
  options.strategy = one.strategy;
  options.activation_checkpointing = one.checkpointing;
  options.param_dtype = one.dtype;
  options.deterministic = true;
  options.optimizer.kind =
      is_adamw(one) ? optim::OptimizerKind::kAdamW : optim::OptimizerKind::kSgd;
  options.optimizer.momentum = is_adamw(one) ? 0 : 0.9;
  options.groups = {{.name = "all", .weight_decay = 0.01}};
  options.placement.slots = 2;
  options.placement.force_slot_home = true;
  options.poison = true;
  if (one.shard_group < one.ranks) options.placement.sharding_group_size = one.shard_group;
  return options;
}

struct Curves {
  std::vector<double> losses, norms;
};

template <class Model, class LossOf>
Curves train(Model& sharded, const Case& one, LossOf&& loss_of) {
  Curves run;
  const int rank = sharded.comm().rank();
  for (int step = 0; step < kSteps; ++step) {
    Step open = sharded.begin_step(kAccumulation);
    for (int a = 0; a < kAccumulation; ++a) {
      const Loss loss = loss_of(sharded, step, a * one.ranks + rank);
      open.backward(loss.sum, loss.terms);
    }
    const StepStats stats =
        open.finish({.learning_rate = is_adamw(one) ? 1e-3 : 0.05, .max_grad_norm = 1.0});
    run.losses.push_back(stats.loss);
    run.norms.push_back(stats.grad_norm);
  }
  return run;
}

Curves train_rank(comm::Communicator& own, const Case& one) {
  const std::shared_ptr<comm::Communicator> comm(&own, [](auto*) {});
  const std::string directory = cat(FSDP_RUNS_DIR, "/", one.model);
  if (one.model == std::string("mlp")) {
    auto sharded = fully_shard(Mlp(), comm, options_of(one));
    load_weights(sharded.core(), io::HfWeights::open(directory));
    return train(sharded, one, mlp_loss);
  }
  auto sharded = fully_shard(
      models::make_causal_lm(io::HfModelConfig::read(directory), at::TensorOptions(at::kMeta)),
      comm, options_of(one));
  load_weights(sharded.core(), io::HfWeights::open(directory));
  return train(sharded, one,
               [](auto& model, int step, int m) { return llama_loss(model, step, m); });
}

std::vector<double> numbers(const io::Json& array) {
  std::vector<double> values;
  for (const io::Json& value : array.elements()) values.push_back(value.as_double());
  return values;
}

// `own_error`: the same numbers of FSDP2 in fp64, or empty.
void expect_follows(const char* what, const std::vector<double>& got,
                    const std::vector<double>& expected, const std::vector<double>& exact,
                    double tolerance) {
  ASSERT_EQ(got.size(), expected.size());
  double spread = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!exact.empty())
      spread = std::max(spread, std::abs(expected[i] - exact[i]) / std::abs(exact[i]));
    EXPECT_NEAR(got[i], expected[i], std::max(tolerance, 3 * spread) * std::abs(expected[i]))
        << what << " of step " << i;
  }
  EXPECT_LE(spread, 1e-5) << "FSDP2 in fp32 is too far from fp64 to compare with";
}

class Fsdp2Parity : public ::testing::TestWithParam<Case> {};

TEST_P(Fsdp2Parity, SameLossesAndNormsForTwentySteps) {
  const Case one = GetParam();
  Curves got;
  run_ranks(one.ranks, [&](comm::Communicator& own) {
    Curves mine = train_rank(own, one);
    if (own.rank() == 0) got = std::move(mine);
  });
  const io::Json runs = io::Json::read(cat(FSDP_RUNS_DIR, "/runs.", one.ranks, ".json"));
  const io::Json& truth = runs[cat(one.model, ".", one.optimizer, ".", one.ranks, ".",
                                   one.shard_group, ".", dtype_name(one.dtype))];
  const bool exact = one.dtype == DType::kF32;
  const auto of_exact = [&](const char* name) {
    return exact ? numbers(truth["fp64"][name]) : std::vector<double>();
  };
  expect_follows("loss", got.losses, numbers(truth["losses"]), of_exact("losses"),
                 exact ? 1e-6 : 5e-4);
  expect_follows("norm", got.norms, numbers(truth["norms"]), of_exact("norms"),
                 exact ? 1e-6 : 0x3p-9);
}

std::vector<Case> all_cases() {
  using enum plan::Strategy;
  std::vector<Case> cases;
  for (const char* model : {"mlp", "llama"}) {
    for (const char* optimizer : {"adamw", "sgd"}) {
      for (const auto strategy : {kFullShard, kShardGradOp, kNoShard}) {
        for (const bool checkpointing : {false, true})
          cases.push_back({model, optimizer, 2, 2, strategy, checkpointing});
      }
    }
    cases.push_back({model, "adamw", 2, 2, kFullShard, false, DType::kBF16});
    cases.push_back({model, "adamw", 2, 2, kShardGradOp, true, DType::kBF16});
  }
  cases.push_back({"mlp", "adamw", 4, 4, kFullShard});
  cases.push_back({"mlp", "adamw", 4, 4, kShardGradOp, true});
  cases.push_back({"mlp", "adamw", 4, 2, kHybridShard});
  cases.push_back({"mlp", "adamw", 4, 2, kHybridShard, true});
  cases.push_back({"mlp", "sgd", 4, 2, kHybridShardZero2});
  return cases;
}
INSTANTIATE_TEST_SUITE_P(Torchrun, Fsdp2Parity, ::testing::ValuesIn(all_cases()),
                         [](const auto& info) { return name_of(info.param); });

}  // namespace
}  // namespace fsdp::testing
