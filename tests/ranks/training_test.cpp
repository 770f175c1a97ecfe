// Sharded training against a plain loop in one process, with LibTorch's own AdamW and clipping.

#include <gtest/gtest.h>

#include "libfsdp/base/error.h"
#include "tests/ranks/training_run.h"

namespace fsdp::testing {
namespace {

constexpr int kGlobalMicroBatches = 12;
// Two correct orders of summation differ by 1e-7 in the loss and 6e-7 in a tensor's norm after 20
// steps of AdamW.
constexpr double kLossTolerance = 1e-6;
constexpr double kWeightTolerance = 5e-6;

struct Case {
  plan::Strategy strategy;
  int ranks;
  bool checkpointing;
};
void PrintTo(const Case& one, std::ostream* out) {
  *out << plan::strategy_name(one.strategy) << " on " << one.ranks
       << (one.checkpointing ? ", recompute" : "");
}
class ShardedTrainingGrid : public ::testing::TestWithParam<Case> {};

TEST_P(ShardedTrainingGrid, FollowsThePlainLoopForTwentySteps) {
  ShardOptions options = base_options();
  options.strategy = GetParam().strategy;
  options.activation_checkpointing = GetParam().checkpointing;
  for (const int micro_batches :
       {GetParam().ranks, 3 * GetParam().ranks, 3 * GetParam().ranks - 1}) {
    SCOPED_TRACE(cat(micro_batches, " micro-batches"));
    expect_close(train_sharded(GetParam().ranks, micro_batches, options),
                 train_plainly(micro_batches), kLossTolerance, kWeightTolerance);
  }
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const auto strategy :
       {plan::Strategy::kFullShard, plan::Strategy::kShardGradOp, plan::Strategy::kNoShard}) {
    for (const int ranks : {1, 2, 3, 4}) {
      for (const bool checkpointing : {false, true})
        cases.push_back({strategy, ranks, checkpointing});
    }
  }
  return cases;
}
INSTANTIATE_TEST_SUITE_P(All, ShardedTrainingGrid, ::testing::ValuesIn(all_cases()),
                         [](const auto& info) {
                           return cat(plan::strategy_name(info.param.strategy), "Ranks",
                                      info.param.ranks,
                                      info.param.checkpointing ? "Recompute" : "Keep");
                         });

TEST(ShardedTraining, GivesRanksWithoutDataNothingToDoInTheFirstStep) {
  for (const int micro_batches : {1, 2, 5}) {
    SCOPED_TRACE(cat(micro_batches, " micro-batches"));
    expect_close(train_sharded(4, micro_batches, base_options()), train_plainly(micro_batches),
                 kLossTolerance, kWeightTolerance);
  }
}

TEST(Bf16Training, FollowsThePlainLoopWithAnExactMaster) {
  ShardOptions options = base_options();
  options.param_dtype = DType::kBF16;
  // The first step sees equal bf16 parameters. Later ones: logits carry bf16's relative error of
  // 2^-9, so a token's loss is known to 2 x 2^-9 x max|logit| (about 1), 1e-3 of 3.6; and where a
  // gradient is below that noise (2^-8 of the elements, say) AdamW steps by the full rate in either
  // direction: sqrt(2^-8) x rate against weights that moved by the rate itself.
  const Trajectory truth = train_plainly(6, DType::kBF16);
  for (const int ranks : {1, 2, 3}) {
    const Trajectory got = train_sharded(ranks, 6, options);
    EXPECT_NEAR(got.losses[0], truth.losses[0], 1e-6);
    EXPECT_NEAR(got.norms[0], truth.norms[0], 1e-6 * truth.norms[0]);
    expect_close(got, truth, 1e-3, 0x1p-4);
  }
}

TEST(Bf16Training, IsBitwiseEqualForAllRanks) {
  ShardOptions options = base_options();
  options.param_dtype = DType::kBF16;
  const Trajectory truth = train_sharded(1, kGlobalMicroBatches, options);
  for (const int ranks : {2, 3, 4}) {
    const Trajectory got = train_sharded(ranks, kGlobalMicroBatches, options);
    EXPECT_EQ(got.losses, truth.losses);
    EXPECT_EQ(got.weights, truth.weights);
  }
}

TEST(DeterministicTraining, IsBitwiseEqualForAllRanksStrategiesAndModes) {
  const Trajectory truth = train_sharded(1, kGlobalMicroBatches, base_options());
  for (const Case& one : all_cases()) {
    SCOPED_TRACE(cat(plan::strategy_name(one.strategy), " on ", one.ranks,
                     one.checkpointing ? " recompute" : ""));
    ShardOptions options = base_options();
    options.strategy = one.strategy;
    options.activation_checkpointing = one.checkpointing;
    const Trajectory got = train_sharded(one.ranks, kGlobalMicroBatches, options);
    EXPECT_EQ(got.losses, truth.losses);
    EXPECT_EQ(got.norms, truth.norms);
    EXPECT_EQ(got.weights, truth.weights);
  }
}

}  // namespace
}  // namespace fsdp::testing
