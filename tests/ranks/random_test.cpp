// Dropout in sharded training: the same bits at any number of ranks, under every strategy, kept or
// recomputed.

#include <gtest/gtest.h>
#include <torch/nn/modules/dropout.h>
#include <torch/utils.h>

#include <mutex>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/dropout.h"
#include "tests/ranks/training_run.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

constexpr int kDropoutSteps = 3;
constexpr int kGlobalMicroBatches = 12;
constexpr double kProbability = 0.2;

struct DropoutBlockImpl : torch::nn::Module {
  explicit DropoutBlockImpl(int64_t width) : up(width, 2 * width), down(2 * width, width) {
    register_module("up", up);
    register_module("down", down);
    register_module("drop", drop);
  }
  at::Tensor forward(const at::Tensor& x) {
    return x + drop(down(fsdp::dropout(at::gelu(up(x)), kProbability, is_training())));
  }
  torch::nn::Linear up, down;
  fsdp::Dropout drop{kProbability};
};
TORCH_MODULE(DropoutBlock);

// A unit that calls the unit inside it twice. No parameter is used more than twice: three gradients
// are summed in another order when some of them come from one recomputation.
struct OuterBlockImpl : torch::nn::Module {
  explicit OuterBlockImpl(int64_t width) : inner(width) {
    register_module("inner", inner);
    register_module("drop", drop);
  }
  at::Tensor forward(const at::Tensor& x) {
    return drop(inner->forward(drop(inner->forward(x)))) + x;
  }
  Unit<DropoutBlock> inner;
  fsdp::Dropout drop{kProbability};
};
TORCH_MODULE(OuterBlock);

struct DropoutNetImpl : torch::nn::Module {
  DropoutNetImpl() : embed(37, 24), outer(24), head(24, 37) {
    register_module("embed", embed);
    register_module("outer", outer);
    for (int i = 0; i < 3; ++i) {
      blocks.emplace_back(24);
      register_module(cat("block", i), blocks.back());
    }
    register_module("head", head);
  }
  at::Tensor loss(const MicroBatch& batch) {
    at::Tensor x = fsdp::dropout(embed(batch.ids), kProbability, is_training());  // Of the root.
    for (auto& block : blocks) x = block->forward(x);
    x = blocks[0]->forward(outer->forward(x));  // Again: other numbers than the first time.
    return at::cross_entropy_loss(head(x), batch.targets, {}, at::Reduction::Sum);
  }
  torch::nn::Embedding embed;
  std::vector<Unit<DropoutBlock>> blocks;
  Unit<OuterBlock> outer;
  torch::nn::Linear head;
};
TORCH_MODULE(DropoutNet);

DropoutNet make_dropout_net() {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  torch::manual_seed(7);
  return DropoutNet();
}

Trajectory train(int ranks, const ShardOptions& options, bool training = true) {
  Trajectory result;
  run_ranks(ranks, [&](comm::Communicator& own) {
    auto sharded = fully_shard(make_dropout_net(), borrow(own), options);
    sharded.module()->train(training);
    for (int step = 0; step < kDropoutSteps; ++step) {
      Step open = sharded.begin_step(kGlobalMicroBatches / ranks);
      for (int a = 0; a < kGlobalMicroBatches / ranks; ++a) {
        const MicroBatch batch = micro_batch(step, a * ranks + own.rank());
        open.backward(sharded.run([&](auto& net) { return net.loss(batch); }), batch.ids.numel());
      }
      const StepStats stats = open.finish({.learning_rate = kRate, .max_grad_norm = kMaxNorm});
      if (own.rank() == 0) result.losses.push_back(stats.loss);
    }
    collect_weights(sharded.core(), result);
  });
  return result;
}

TEST(DropoutTraining, IsBitwiseEqualForAllRanksStrategiesAndModes) {
  // A unit that is called four times, in pairs inside another one: recomputed, the pairs' gradients
  // are summed first; kept, one after the other. So the modes differ in the last bit of that sum.
  const Trajectory kept = train(1, base_options());
  ShardOptions recompute = base_options();
  recompute.activation_checkpointing = true;
  const Trajectory recomputed = train(1, recompute);
  EXPECT_EQ(kept.losses.front(), recomputed.losses.front());
  EXPECT_NEAR(kept.losses.back(), recomputed.losses.back(), 1e-6 * kept.losses.back());
  for (const auto strategy :
       {plan::Strategy::kFullShard, plan::Strategy::kShardGradOp, plan::Strategy::kNoShard}) {
    for (const int ranks : {1, 2, 3, 4}) {
      for (const bool checkpointing : {false, true}) {
        const Trajectory& truth = checkpointing ? recomputed : kept;
        SCOPED_TRACE(
            cat(plan::strategy_name(strategy), " on ", ranks, checkpointing ? " recompute" : ""));
        ShardOptions options = base_options();
        options.strategy = strategy;
        options.activation_checkpointing = checkpointing;
        const Trajectory got = train(ranks, options);
        EXPECT_EQ(got.losses, truth.losses);
        EXPECT_EQ(got.weights, truth.weights);
      }
    }
  }
}

TEST(DropoutTraining, TheSeedDecidesAndEvaluationDrawsNothing) {
  ShardOptions other = base_options();
  other.seed = 1;
  const Trajectory first = train(1, base_options());
  EXPECT_NE(train(1, other).losses[0], first.losses[0]);
  const Trajectory still = train(1, base_options(), /*training=*/false);
  EXPECT_NE(still.losses[0], first.losses[0]);
  EXPECT_EQ(train(1, other, /*training=*/false).losses, still.losses);
}

// With no update between them, two steps on the same batch differ only by what dropout drew; and
// micro-batches of one step draw different numbers.
TEST(DropoutTraining, StepsAndMicroBatchesDrawOtherNumbers) {
  run_ranks(1, [](comm::Communicator& own) {
    auto sharded = fully_shard(make_dropout_net(), borrow(own), base_options());
    const MicroBatch batch = micro_batch(0, 0);
    std::vector<double> losses;
    for (int step = 0; step < 2; ++step) {
      Step open = sharded.begin_step(2);
      for (int a = 0; a < 2; ++a) {
        const at::Tensor loss = sharded.run([&](auto& net) { return net.loss(batch); });
        losses.push_back(loss.item<double>());
        open.backward(loss, batch.ids.numel());
      }
      open.finish({.learning_rate = 0});
    }
    for (size_t i = 0; i < losses.size(); ++i) {
      for (size_t j = 0; j < i; ++j) EXPECT_NE(losses[i], losses[j]) << i << " " << j;
    }
  });
}

TEST(DropoutTraining, DeterministicModeRefusesStockDropout) {
  struct StockImpl : torch::nn::Module {
    StockImpl() {
      register_module("layer", layer);
      register_module("drop", drop);
    }
    torch::nn::Linear layer{2, 2};
    torch::nn::Dropout drop{0.1};
  };
  run_ranks(1, [](comm::Communicator& own) {
    ShardOptions options = base_options();
    try {
      fully_shard(torch::nn::ModuleHolder<StockImpl>(), borrow(own), options);
      ADD_FAILURE() << "accepted";
    } catch (const ConfigError& error) {
      EXPECT_NE(std::string(error.what()).find("'drop'"), std::string::npos) << error.what();
    }
    options.deterministic = false;
    fully_shard(torch::nn::ModuleHolder<StockImpl>(), borrow(own), options);
  });
}

}  // namespace
}  // namespace fsdp::testing
