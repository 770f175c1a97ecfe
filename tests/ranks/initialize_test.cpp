// Initialisation of sharded parameters: the same weights at any number of ranks and under every
// strategy.

#include <gtest/gtest.h>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/init.h"
#include "tests/ranks/training_run.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

Trajectory initialized(int ranks, plan::Strategy strategy, DType dtype, uint64_t seed = 4) {
  Trajectory result;
  run_ranks(ranks, [&](comm::Communicator& own) {
    ShardOptions options = base_options();
    options.strategy = strategy;
    options.param_dtype = dtype;
    auto sharded = fully_shard(make_net(), borrow(own), options);
    sharded.initialize(default_initializer(*sharded.module(), seed));
    collect_weights(sharded.core(), result);
  });
  return result;
}

TEST(Initialize, GivesTheSameWeightsAtAnyNumberOfRanksAndUnderEveryStrategy) {
  const Trajectory truth = initialized(1, plan::Strategy::kFullShard, DType::kF32);
  // The whole parameter, filled at once.
  const ResidualNet net = make_net();
  const FillFunction fill = default_initializer(*net, 4);
  for (const auto& entry : net->named_parameters()) {
    std::vector<float> values(static_cast<size_t>(entry.value().numel()));
    fill(entry.key(), entry.value().sizes(), 0, values);
    EXPECT_EQ(truth.weights.at(entry.key()), values) << entry.key();
  }
  for (const auto strategy :
       {plan::Strategy::kFullShard, plan::Strategy::kShardGradOp, plan::Strategy::kNoShard}) {
    for (const int ranks : {1, 2, 3, 4, 8}) {
      EXPECT_EQ(initialized(ranks, strategy, DType::kF32).weights, truth.weights)
          << plan::strategy_name(strategy) << " on " << ranks;
    }
  }
}

TEST(Initialize, KeepsAllBitsBesideBf16Parameters) {
  const Trajectory truth = initialized(1, plan::Strategy::kFullShard, DType::kF32);
  EXPECT_EQ(initialized(3, plan::Strategy::kFullShard, DType::kBF16).weights, truth.weights);
}

TEST(Initialize, SeedsGiveOtherWeights) {
  EXPECT_NE(initialized(1, plan::Strategy::kFullShard, DType::kF32, 5).weights,
            initialized(1, plan::Strategy::kFullShard, DType::kF32, 4).weights);
}

}  // namespace
}  // namespace fsdp::testing
