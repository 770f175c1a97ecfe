// Sharded training against a plain loop in one process, with LibTorch's own AdamW and clipping.

#include <gtest/gtest.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>
#include <torch/utils.h>

#include <cmath>
#include <map>
#include <mutex>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/sharded.h"
#include "tests/ranks/residual_net.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

constexpr int kUnits = 12;
constexpr int kSteps = 20;
constexpr int kGlobalMicroBatches = 12;
constexpr double kRate = 1e-3;
constexpr double kMaxNorm = 1.0;

struct Trajectory {
  std::vector<double> losses;
  std::vector<double> norms;
  std::map<std::string, std::vector<float>> weights;
};

ResidualNet make_net() {
  static std::mutex one_at_a_time;  // The default generator is shared by all threads.
  const std::lock_guard lock(one_at_a_time);
  torch::manual_seed(7);
  return ResidualNet(kUnits);
}

struct MicroBatch {
  at::Tensor ids, targets;
};

// Micro-batch m of step s: 5 to 8 tokens, a function of (s, m) alone.
MicroBatch micro_batch(int step, int m) {
  const int64_t tokens = 5 + (step + m) % 4;
  std::vector<int64_t> ids, targets;
  for (int64_t t = 0; t < tokens; ++t) {
    ids.push_back((step * 131 + m * 17 + t * 7) % 37);
    targets.push_back((step * 31 + m * 5 + t * 11 + 3) % 37);
  }
  return {at::tensor(ids), at::tensor(targets)};
}

Trajectory train_plainly(int micro_batches) {
  at::set_num_threads(1);
  ResidualNet net = make_net();
  torch::optim::AdamW optimizer(net->parameters(),
                                torch::optim::AdamWOptions(kRate).weight_decay(0.01));
  Trajectory result;
  for (int step = 0; step < kSteps; ++step) {
    optimizer.zero_grad();
    double loss_sum = 0;
    int64_t tokens = 0;
    for (int m = 0; m < micro_batches; ++m) {
      const MicroBatch batch = micro_batch(step, m);
      const at::Tensor loss = net->loss(batch.ids, batch.targets);
      loss.backward();
      loss_sum += loss.item<double>();
      tokens += batch.ids.numel();
    }
    for (auto& parameter : net->parameters()) parameter.grad().div_(static_cast<double>(tokens));
    result.norms.push_back(torch::nn::utils::clip_grad_norm_(net->parameters(), kMaxNorm));
    result.losses.push_back(loss_sum / static_cast<double>(tokens));
    optimizer.step();
  }
  for (const auto& entry : net->named_parameters()) {
    const at::Tensor flat = entry.value().detach().contiguous().view(-1);
    result.weights[entry.key()].assign(flat.data_ptr<float>(),
                                       flat.data_ptr<float>() + flat.numel());
  }
  return result;
}

void collect_weights(ShardedCore& core, Trajectory& into) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  for (const ParameterInfo& info : core.parameters()) {
    int64_t numel = 1;
    for (const int64_t dim : info.shape) numel *= dim;
    into.weights[info.name].resize(static_cast<size_t>(numel));
  }
  for (const OwnedSlice& piece : core.owned_slices()) {
    auto& whole = into.weights[piece.name];
    core.load(piece, 0,
              std::span(whole).subspan(static_cast<size_t>(piece.param_at),
                                       static_cast<size_t>(piece.numel)));
  }
}

ShardOptions base_options() {
  ShardOptions options;
  options.deterministic = true;
  options.groups = {{.name = "all", .lr_scale = 1, .weight_decay = 0.01}};
  options.placement.slots = 2;
  options.placement.force_slot_home = true;
  options.poison = true;
  return options;
}

std::shared_ptr<comm::Communicator> borrow(comm::Communicator& own) {
  return {&own, [](comm::Communicator*) {}};
}

Trajectory train_sharded(int ranks, int micro_batches, const ShardOptions& options) {
  Trajectory result;
  run_ranks(ranks, [&](comm::Communicator& own) {
    const int rank = own.rank();
    auto sharded = fully_shard(make_net(), borrow(own), options);
    for (int step = 0; step < kSteps; ++step) {
      const int mine = (micro_batches - rank + ranks - 1) / ranks;
      Step open = sharded.begin_step(mine);
      for (int a = 0; a < mine; ++a) {
        const MicroBatch batch = micro_batch(step, a * ranks + rank);
        const at::Tensor loss =
            sharded.run([&](auto& net) { return net.loss(batch.ids, batch.targets); });
        open.backward(loss, batch.ids.numel());
      }
      const StepStats stats = open.finish({.learning_rate = kRate, .max_grad_norm = kMaxNorm});
      if (rank == 0) {
        result.losses.push_back(stats.loss);
        result.norms.push_back(stats.grad_norm);
      }
    }
    collect_weights(sharded.core(), result);
  });
  return result;
}

// Losses to 1e-6 relative; each tensor's norm of difference to 5e-6 of its norm: two correct orders
// of summation differ by 1e-7 and 6e-7 after 20 steps of AdamW in fp32.
void expect_close(const Trajectory& got, const Trajectory& truth) {
  ASSERT_EQ(got.losses.size(), truth.losses.size());
  for (size_t i = 0; i < truth.losses.size(); ++i) {
    EXPECT_NEAR(got.losses[i], truth.losses[i], 1e-6 * truth.losses[i]) << "step " << i;
    EXPECT_NEAR(got.norms[i], truth.norms[i], 1e-5 * truth.norms[i]) << "step " << i;
  }
  for (const auto& [name, expected] : truth.weights) {
    const auto& actual = got.weights.at(name);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      difference += std::pow(double{actual[i]} - expected[i], 2);
      norm += std::pow(double{expected[i]}, 2);
    }
    EXPECT_LE(std::sqrt(difference), 5e-6 * std::sqrt(norm)) << name;
  }
}

struct Case {
  plan::Strategy strategy;
  int ranks;
  bool checkpointing;
};
class ShardedTraining : public ::testing::TestWithParam<Case> {};

TEST_P(ShardedTraining, FollowsThePlainLoopForTwentySteps) {
  ShardOptions options = base_options();
  options.strategy = GetParam().strategy;
  options.activation_checkpointing = GetParam().checkpointing;
  for (const int micro_batches :
       {GetParam().ranks, 3 * GetParam().ranks, 3 * GetParam().ranks - 1}) {
    SCOPED_TRACE(cat(micro_batches, " micro-batches"));
    expect_close(train_sharded(GetParam().ranks, micro_batches, options),
                 train_plainly(micro_batches));
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
INSTANTIATE_TEST_SUITE_P(All, ShardedTraining, ::testing::ValuesIn(all_cases()),
                         [](const auto& info) {
                           return cat(plan::strategy_name(info.param.strategy), "Ranks",
                                      info.param.ranks,
                                      info.param.checkpointing ? "Recompute" : "Keep");
                         });

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
