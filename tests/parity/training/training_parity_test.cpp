// Sharded training of 12-layer models over 2 poisoned slots against PyTorch: transformers' model,
// torch.optim.AdamW.
//
// Two correct orders of summation of a gradient differ, after 20 steps of AdamW in fp32, by some
// 1e-7 in the loss: hence 1e-6. In the weights they differ by what AdamW makes of gradients near
// zero: the runs hold PyTorch's distance from itself (row by row, and in fp64), and we may be 3
// times as far, or 5e-6. Not the biases of k_proj: their gradient is zero but for rounding.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "libfsdp/io/hf_config.h"
#include "libfsdp/models/batch.h"
#include "libfsdp/models/registry.h"
#include "libfsdp/shard/sharded.h"
#include "libfsdp/shard/state.h"
#include "tests/parity/tensors.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

constexpr int kSteps = 20;

struct Case {
  const char* kind;
  plan::Strategy strategy;
  int ranks;
  int accumulation;
  bool checkpointing;
};

std::string name_of(const Case& one) {
  return cat(one.kind, plan::strategy_name(one.strategy), "Ranks", one.ranks, "Accumulate",
             one.accumulation, one.checkpointing ? "Recompute" : "Keep");
}
void PrintTo(const Case& one, std::ostream* out) { *out << name_of(one); }

ShardOptions options_of(const Case& one) {
  ShardOptions options;
  options.strategy = one.strategy;
  options.activation_checkpointing = one.checkpointing;
  options.deterministic = true;
  options.groups = {{.name = "all", .weight_decay = 0.01}};
  options.placement.slots = 2;
  options.placement.force_slot_home = true;
  options.poison = true;
  return options;
}

using Weights = std::map<std::string, at::Tensor>;

void collect(ShardedCore& core, Weights& weights) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  for (const ParameterInfo& info : core.parameters())
    weights.emplace(info.name, at::zeros(info.shape));
  for (const OwnedSlice& piece : core.owned_slices()) {
    auto* values = weights.at(piece.name).data_ptr<float>() + piece.param_at;
    core.load(piece, 0, {values, static_cast<size_t>(piece.numel)});
  }
}

class TrainingParity : public ::testing::TestWithParam<Case> {};

TEST_P(TrainingParity, FollowsPytorchForTwentySteps) {
  const Case one = GetParam();
  const std::string directory = cat(FSDP_RUNS_DIR, "/", one.kind);
  const auto file = io::SafetensorsFile::open(directory + "/runs.safetensors");
  const int micro_batches = one.ranks * one.accumulation;
  std::vector<double> losses, norms;
  Weights weights;
  run_ranks(one.ranks, [&](comm::Communicator& own) {
    const auto config = io::HfModelConfig::read(directory);
    auto sharded =
        fully_shard(models::make_causal_lm(config, at::TensorOptions(at::kMeta)),
                    std::shared_ptr<comm::Communicator>(&own, [](auto*) {}), options_of(one));
    load_weights(sharded.core(), io::HfWeights::open(directory),
                 std::vector<std::string>{"lm_head.weight"});
    for (int step = 0; step < kSteps; ++step) {
      Step open = sharded.begin_step(one.accumulation);
      for (int a = 0; a < one.accumulation; ++a) {
        const std::string place = cat(step, ".", a * one.ranks + own.rank());
        const auto batch =
            models::make_batch(read(file, "ids." + place), read(file, "labels." + place));
        open.backward(sharded.run([&](auto& model) { return model.loss(batch); }),
                      batch.trainable_tokens());
      }
      const StepStats stats = open.finish({.learning_rate = 1e-3, .max_grad_norm = 1.0});
      if (own.rank() != 0) continue;
      losses.push_back(stats.loss);
      norms.push_back(stats.grad_norm);
    }
    collect(sharded.core(), weights);
  });
  const at::Tensor expected_losses = read(file, cat("losses.", micro_batches));
  const at::Tensor expected_norms = read(file, cat("norms.", micro_batches));
  ASSERT_EQ(losses.size(), size_t{kSteps});
  for (int step = 0; step < kSteps; ++step) {
    const double loss = expected_losses[step].item<double>(),
                 norm = expected_norms[step].item<double>();
    EXPECT_NEAR(losses[size_t(step)], loss, 1e-6 * loss) << "step " << step;
    EXPECT_NEAR(norms[size_t(step)], norm, 1e-4 * norm) << "step " << step;
  }
  const double tolerance =
      std::max(5e-6, 10 * read(file, cat("spread.", micro_batches)).item<double>());
  EXPECT_LE(tolerance, 1e-3);
  for (const auto& [name, values] : weights) {
    if (name.ends_with("k_proj.bias")) continue;
    const at::Tensor expected = read(file, cat("weights.", micro_batches, ".", name));
    EXPECT_LE((values - expected).norm().item<double>(), tolerance * expected.norm().item<double>())
        << name;
  }
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  using enum plan::Strategy;
  for (const auto strategy : {kFullShard, kShardGradOp, kNoShard}) {
    for (const int ranks : {1, 2, 3, 4}) {
      for (const int accumulation : {1, 3}) {
        for (const bool checkpointing : {false, true}) {
          cases.push_back({"llama", strategy, ranks, accumulation, checkpointing});
        }
      }
    }
  }
  cases.push_back({"qwen2", kFullShard, 2, 3, false});
  cases.push_back({"qwen2", kFullShard, 3, 1, true});
  return cases;
}
INSTANTIATE_TEST_SUITE_P(Pytorch, TrainingParity, ::testing::ValuesIn(all_cases()),
                         [](const auto& info) { return name_of(info.param); });

}  // namespace
}  // namespace fsdp::testing
