// The promise of deterministic mode: the same bits of losses, norms, gradients and weights for any
// division of the global batch into ranks and accumulation steps, under every strategy and home,
// with activations kept or recomputed, dropout included. FSDP_TEST_SCALE=long: 200 steps.

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string_view>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/dropout.h"
#include "tests/ranks/training_run.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

constexpr int kBlocks = 5;
constexpr int64_t kWidth = 16;
constexpr int64_t kVocabulary = 37;
constexpr int kGlobalMicroBatches = 8;
constexpr double kProbability = 0.1;

int num_steps() {
  const char* scale = std::getenv("FSDP_TEST_SCALE");
  return scale && std::string_view(scale) == "long" ? 200 : 8;
}

struct ExactNetImpl : torch::nn::Module {
  ExactNetImpl() : embed(kVocabulary, kWidth), head(kWidth, kVocabulary) {
    register_module("embed", embed);
    for (int i = 0; i < kBlocks; ++i) {
      blocks.emplace_back(kWidth, 2 * kWidth + i);
      register_module(cat("block", i), blocks.back());
    }
    register_module("head", head);
  }
  at::Tensor loss(const MicroBatch& batch) {
    at::Tensor x = embed(batch.ids);
    for (auto& block : blocks) x = fsdp::dropout(block->forward(x), kProbability, is_training());
    return at::cross_entropy_loss(head(x), batch.targets, {}, at::Reduction::Sum);
  }
  torch::nn::Embedding embed;
  std::vector<Unit<ResidualBlock>> blocks;
  torch::nn::Linear head;
};
TORCH_MODULE(ExactNet);

ExactNet make_exact_net() {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  torch::manual_seed(3);
  return ExactNet();
}

struct Course {
  std::vector<double> losses, norms;
  std::map<std::string, at::Tensor> gradients;  // Of the last step.
  Trajectory end;
};

Course train(int ranks, const ShardOptions& options) {
  Course result;
  run_ranks(ranks, [&](comm::Communicator& own) {
    auto sharded = fully_shard(make_exact_net(), borrow(own), options);
    for (int step = 0; step < num_steps(); ++step) {
      Step open = sharded.begin_step(kGlobalMicroBatches / ranks);
      for (int m = own.rank(); m < kGlobalMicroBatches; m += ranks) {
        const MicroBatch batch = micro_batch(step, m);
        open.backward(sharded.run([&](auto& net) { return net.loss(batch); }), batch.ids.numel());
      }
      if (step + 1 == num_steps()) {
        open.complete_gradients();
        for (const ParameterInfo& info : sharded.core().parameters()) {
          const at::Tensor gradient = sharded.full_gradient(info.name);
          if (own.rank() == 0) result.gradients[info.name] = gradient;
        }
      }
      const StepStats stats = open.finish({.learning_rate = kRate, .max_grad_norm = kMaxNorm});
      if (own.rank() != 0) continue;
      result.losses.push_back(stats.loss);
      result.norms.push_back(stats.grad_norm);
    }
    collect_weights(sharded.core(), result.end);
  });
  return result;
}

void expect_same_bits(const Course& got, const Course& truth) {
  EXPECT_EQ(got.losses, truth.losses);
  EXPECT_EQ(got.norms, truth.norms);
  EXPECT_EQ(got.end.weights, truth.end.weights);
  for (const auto& [name, gradient] : truth.gradients)
    EXPECT_TRUE(at::equal(gradient, got.gradients.at(name))) << name;
}

struct Case {
  std::string name;
  plan::Strategy strategy;
  plan::PlacementOverrides placement;
};

std::vector<Case> cases() {
  using plan::Strategy;
  return {{"full shard in 2 slots", Strategy::kFullShard, {.slots = 2, .force_slot_home = true}},
          {"full shard in a shared home", Strategy::kFullShard, {}},
          {"full shard, 2 units kept",
           Strategy::kFullShard,
           {.slots = 1, .gradient_slots = 1, .kept_units = 2, .force_slot_home = true}},
          {"shard grad op", Strategy::kShardGradOp, {.force_slot_home = true}},
          {"hybrid in slots",
           Strategy::kHybridShard,
           {.sharding_group_size = 2, .force_slot_home = true}},
          {"hybrid in shared homes", Strategy::kHybridShard, {.sharding_group_size = 2}},
          {"hybrid zero 2",
           Strategy::kHybridShardZero2,
           {.sharding_group_size = 2, .force_slot_home = true}},
          {"no shard", Strategy::kNoShard, {}},
          {"offloaded parameters", Strategy::kFullShard, {.offload = plan::Offload::kParameters}},
          {"offloaded optimizer, hybrid",
           Strategy::kHybridShard,
           {.sharding_group_size = 2, .offload = plan::Offload::kOptimizer}}};
}

ShardOptions exact_options(const Case& one, bool recompute, DType dtype) {
  ShardOptions options = base_options();
  options.strategy = one.strategy;
  options.placement = one.placement;
  options.activation_checkpointing = recompute;
  options.param_dtype = dtype;
  options.verify_plans = true;
  return options;
}

class Exactness : public ::testing::TestWithParam<DType> {};

TEST_P(Exactness, NoDivisionOfTheBatchChangesABit) {
  const Course truth = train(1, exact_options(cases().front(), false, GetParam()));
  EXPECT_NE(truth.losses.back(), truth.losses.front());
  for (const Case& one : cases()) {
    for (const bool recompute : {false, true}) {
      for (const int ranks : {1, 2, 4, 8}) {
        if (ranks % std::max(one.placement.sharding_group_size, 1) != 0) continue;
        SCOPED_TRACE(cat(one.name, " on ", ranks, recompute ? ", recompute" : ""));
        expect_same_bits(train(ranks, exact_options(one, recompute, GetParam())), truth);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, Exactness, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) {
                           return std::string(info.param == DType::kF32 ? "F32" : "BF16");
                         });

// Fast mode: sums over replicas come last, whatever the mesh.
TEST(ExactnessTest, TwoLevelsOfReductionFollowToSixDigits) {
  ShardOptions options = exact_options(cases().front(), false, DType::kF32);
  const Course truth = train(1, options);
  options.deterministic = false;
  options.strategy = plan::Strategy::kHybridShard;
  for (const plan::Offload offload : {plan::Offload::kNone, plan::Offload::kParameters}) {
    for (const int group : {1, 2}) {
      options.placement = {.sharding_group_size = group, .two_level = true, .offload = offload};
      const Course got = train(4, options);
      ASSERT_EQ(got.losses.size(), truth.losses.size());
      for (size_t i = 0; i < std::min<size_t>(20, truth.losses.size()); ++i)
        EXPECT_NEAR(got.losses[i], truth.losses[i], 1e-6 * truth.losses[i]) << "step " << i;
    }
  }
}

TEST(ExactnessTest, AnotherSeedOfDropoutChangesThem) {
  ShardOptions options = exact_options(cases().front(), false, DType::kF32);
  const Course truth = train(1, options);
  options.seed = 5;
  EXPECT_NE(train(1, options).losses, truth.losses);
}

}  // namespace
}  // namespace fsdp::testing
