// Precisions, optimizers and clipping in sharded training: the same bits at any number of ranks,
// and what each promises against LibTorch.

#include <gtest/gtest.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "libfsdp/base/error.h"
#include "tests/ranks/training_run.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

constexpr int kMicroBatchesOfAll = 4;
constexpr int kShortSteps = 6;

using engine::MasterPrecision;

struct Result {
  Trajectory course;
  std::vector<double> scales;
  std::vector<bool> skipped;
};

Result train(int ranks, const ShardOptions& options, StepOptions step_options = {},
             int poisoned_step = -1) {
  Result result;
  step_options.learning_rate = kRate;
  run_ranks(ranks, [&](comm::Communicator& own) {
    auto sharded = fully_shard(make_net(), borrow(own), options);
    for (int step = 0; step < kShortSteps; ++step) {
      optim::LossScaler* scaler = sharded.core().loss_scaler();
      const double scale = scaler ? scaler->scale() : 1;
      Step open = sharded.begin_step(kMicroBatchesOfAll / ranks);
      for (int m = own.rank(); m < kMicroBatchesOfAll; m += ranks) {
        const MicroBatch batch = micro_batch(step, m);
        at::Tensor loss =
            sharded.run([&](auto& net) { return net.loss(batch.ids, batch.targets); });
        if (step == poisoned_step && m == 0) {
          loss.register_hook([](const at::Tensor& gradient) {
            return gradient * std::numeric_limits<double>::infinity();
          });
        }
        open.backward(loss, batch.ids.numel());
      }
      const StepStats stats = open.finish(step_options);
      if (own.rank() != 0) continue;
      result.course.losses.push_back(stats.loss);
      result.course.norms.push_back(stats.grad_norm);
      result.scales.push_back(scale);
      result.skipped.push_back(stats.skipped);
    }
    collect_weights(sharded.core(), result.course);
  });
  return result;
}

struct Case {
  const char* name;
  DType param_dtype;
  MasterPrecision master;
  optim::OptimizerOptions optimizer;
  std::optional<DType> reduce_dtype;
};
void PrintTo(const Case& one, std::ostream* out) { *out << one.name; }

std::vector<Case> cases() {
  using optim::OptimizerKind;
  const optim::OptimizerOptions adamw;
  optim::OptimizerOptions momentum{.kind = OptimizerKind::kSgd, .momentum = 0.9};
  optim::OptimizerOptions kahan{.kind = OptimizerKind::kAnyPrecisionAdamW};
  kahan.use_kahan_summation = true;
  kahan.variance_dtype = DType::kBF16;
  optim::OptimizerOptions stochastic{.kind = OptimizerKind::kAnyPrecisionAdamW};
  stochastic.stochastic_rounding = true;
  const optim::OptimizerOptions eight{.kind = OptimizerKind::kAdamW8bit, .min_8bit_size = 1024};
  return {{"Fp32Momentum", DType::kF32, MasterPrecision::kSplit, momentum, {}},
          {"Fp32EightBit", DType::kF32, MasterPrecision::kSplit, eight, {}},
          {"Fp32SentAsBf16", DType::kF32, MasterPrecision::kSplit, adamw, DType::kBF16},
          {"Bf16Split", DType::kBF16, MasterPrecision::kSplit, adamw, {}},
          {"Bf16SentAsFp32", DType::kBF16, MasterPrecision::kSplit, adamw, DType::kF32},
          {"Bf16PlainMaster", DType::kBF16, MasterPrecision::kF32, adamw, {}},
          {"Bf16EightBit", DType::kBF16, MasterPrecision::kSplit, eight, {}},
          {"Bf16Kahan", DType::kBF16, MasterPrecision::kNone, kahan, {}},
          {"Bf16Stochastic", DType::kBF16, MasterPrecision::kNone, stochastic, {}},
          {"Fp16Scaled", DType::kF16, MasterPrecision::kSplit, adamw, DType::kF32}};
}

ShardOptions options_of(const Case& one) {
  ShardOptions options = base_options();
  options.param_dtype = one.param_dtype;
  options.master = one.master;
  options.optimizer = one.optimizer;
  options.reduce_dtype = one.reduce_dtype;
  options.seed = 5;
  return options;
}

class Precision : public ::testing::TestWithParam<Case> {};

TEST_P(Precision, IsBitwiseEqualForAllRanksAndLearns) {
  const ShardOptions options = options_of(GetParam());
  const Result truth = train(1, options);
  EXPECT_TRUE(std::isfinite(truth.course.losses.back()));
  const Trajectory fp32 = train(1, base_options()).course;
  // AdamW with a rate of 1e-3 moves the loss by 1e-2 a step; 16 bits and another optimizer stay
  // near.
  EXPECT_NEAR(truth.course.losses.front(), fp32.losses.front(), 2e-2);
  EXPECT_NEAR(truth.course.losses.back(), fp32.losses.back(), 0.3);
  for (const int ranks : {2, 4}) {
    for (const bool shared : {false, true}) {
      ShardOptions other = options;
      other.placement.force_slot_home = !shared;
      if (shared) other.placement.slots = 0;
      SCOPED_TRACE(cat(ranks, shared ? " ranks, shared" : " ranks, slots"));
      const Result got = train(ranks, other);
      EXPECT_EQ(got.course.losses, truth.course.losses);
      EXPECT_EQ(got.course.norms, truth.course.norms);
      EXPECT_EQ(got.course.weights, truth.course.weights);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Precision, ::testing::ValuesIn(cases()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(PrecisionTest, AnFp32MasterApartIsAsExactAsASplitOne) {
  Case one{"", DType::kBF16, MasterPrecision::kSplit, {}, {}};
  const Result split = train(2, options_of(one));
  one.master = MasterPrecision::kF32;
  const Result apart = train(2, options_of(one));
  // The parameters that the model sees differ in ties only: half up against half to even.
  EXPECT_NEAR(apart.course.losses.front(), split.course.losses.front(), 1e-3);
  EXPECT_NEAR(apart.course.losses.back(), split.course.losses.back(), 1e-2);
}

TEST(LossScaling, AnOverflowSkipsTheStepOnAllRanksAndLowersTheScale) {
  ShardOptions options = options_of(cases().back());
  // The first micro-batch has 5 tokens, the step four of them: 2^13 / 2^5 = 256.
  options.loss_scaler = optim::LossScalerOptions{.init_scale = 8192};
  for (const int ranks : {1, 2}) {
    const Result got = train(ranks, options, {}, /*poisoned_step=*/2);
    EXPECT_EQ(got.skipped, (std::vector<bool>{false, false, true, false, false, false}));
    EXPECT_EQ(got.scales[2], 256);
    EXPECT_EQ(got.scales[3], 128);
  }
}

// Steps that PyTorch's recipe skips: an fp16 model over fp32 masters, backward of the mean loss
// times the scale. That LossScaler follows torch.amp.GradScaler is another test.
int skipped_by_plain_loop(double init_scale) {
  at::set_num_threads(1);
  ResidualNet net = make_net();
  std::vector<at::Tensor> masters;
  for (const at::Tensor& parameter : net->parameters())
    masters.push_back(parameter.detach().clone().requires_grad_());
  torch::optim::AdamW optimizer(masters, torch::optim::AdamWOptions(kRate).weight_decay(0.01));
  optim::LossScaler scaler({.init_scale = init_scale});
  int skipped = 0;
  for (int step = 0; step < kShortSteps; ++step) {
    std::vector<at::Tensor> parameters = net->parameters();
    for (size_t i = 0; i < masters.size(); ++i) {
      parameters[i].set_data(masters[i].detach().to(at::kHalf));
      parameters[i].mutable_grad() = at::Tensor();
    }
    int64_t tokens = 0;
    for (int m = 0; m < kMicroBatchesOfAll; ++m) tokens += micro_batch(step, m).ids.numel();
    for (int m = 0; m < kMicroBatchesOfAll; ++m) {
      const MicroBatch batch = micro_batch(step, m);
      const at::Tensor mean = net->loss(batch.ids, batch.targets).to(at::kFloat) / tokens;
      (mean * scaler.scale()).backward();
    }
    bool finite = true;
    for (size_t i = 0; i < masters.size(); ++i) {
      masters[i].mutable_grad() = parameters[i].grad().to(at::kFloat) / scaler.scale();
      finite = finite && at::isfinite(masters[i].grad()).all().item<bool>();
    }
    if (finite) optimizer.step();
    scaler.update(!finite);
    skipped += finite ? 0 : 1;
  }
  return skipped;
}

TEST(LossScaling, SkipsAsManyStepsAsPyTorchDoesOnTheMeanLoss) {
  ShardOptions options = options_of(cases().back());
  for (const double init_scale : {0x1p16, 0x1p24}) {
    options.loss_scaler = optim::LossScalerOptions{.init_scale = init_scale};
    for (const int ranks : {1, 4}) {
      const Result got = train(ranks, options);
      const auto skipped = std::count(got.skipped.begin(), got.skipped.end(), true);
      EXPECT_LE(skipped, skipped_by_plain_loop(init_scale)) << init_scale;
      EXPECT_EQ(got.scales.back(), init_scale / 32 / std::exp2(skipped)) << ranks;
    }
  }
}

TEST(LossScaling, LeavesFp32TrainingBitwiseAlone) {
  const Result truth = train(2, base_options());
  ShardOptions options = base_options();
  options.loss_scaler.emplace();  // A power of two.
  const Result got = train(2, options);
  EXPECT_EQ(got.course.losses, truth.course.losses);
  EXPECT_EQ(got.course.weights, truth.course.weights);
}

// LibTorch's own functions on the same gradients.
double torch_norm(const ShardOptions& options, const StepOptions& clip, Trajectory& weights) {
  at::set_num_threads(1);
  ResidualNet net = make_net();
  torch::optim::SGD optimizer(net->parameters(), torch::optim::SGDOptions(kRate));
  double norm = 0;
  for (int step = 0; step < kShortSteps; ++step) {
    optimizer.zero_grad();
    int64_t tokens = 0;
    for (int m = 0; m < kMicroBatchesOfAll; ++m) {
      const MicroBatch batch = micro_batch(step, m);
      net->loss(batch.ids, batch.targets).backward();
      tokens += batch.ids.numel();
    }
    for (at::Tensor& parameter : net->parameters())
      parameter.mutable_grad().div_(static_cast<double>(tokens));
    const double type = clip.norm_type == optim::NormType::kInf
                            ? std::numeric_limits<double>::infinity()
                            : (clip.norm_type == optim::NormType::kOne ? 1.0 : 2.0);
    norm = torch::nn::utils::clip_grad_norm_(
        net->parameters(), clip.max_grad_norm > 0 ? clip.max_grad_norm : 1e9, type);
    if (clip.clip_value > 0) torch::nn::utils::clip_grad_value_(net->parameters(), clip.clip_value);
    optimizer.step();
  }
  static_cast<void>(options);
  for (const auto& entry : net->named_parameters()) {
    const at::Tensor flat = entry.value().detach().contiguous().view(-1);
    weights.weights[entry.key()].assign(flat.data_ptr<float>(),
                                        flat.data_ptr<float>() + flat.numel());
  }
  return norm;
}

TEST(Clipping, ByNorms1And2AndInfAndByValueIsThatOfLibTorch) {
  ShardOptions options = base_options();
  options.optimizer = {.kind = optim::OptimizerKind::kSgd};
  options.groups = {{.name = "all"}};
  for (const StepOptions& clip :
       {StepOptions{.max_grad_norm = 0.5, .norm_type = optim::NormType::kTwo},
        StepOptions{.max_grad_norm = 5, .norm_type = optim::NormType::kOne},
        StepOptions{.max_grad_norm = 0.05, .norm_type = optim::NormType::kInf},
        StepOptions{.clip_value = 0.01}, StepOptions{.max_grad_norm = 0.5, .clip_value = 0.02}}) {
    SCOPED_TRACE(cat("norm type ", static_cast<int>(clip.norm_type), ", max ", clip.max_grad_norm,
                     ", value ", clip.clip_value));
    Trajectory truth;
    const double norm = torch_norm(options, clip, truth);
    const Result got = train(2, options, clip);
    EXPECT_NEAR(got.course.norms.back(), norm, 1e-5 * norm);
    for (const auto& [name, expected] : truth.weights) {
      for (size_t i = 0; i < expected.size(); ++i)
        ASSERT_NEAR(got.course.weights.at(name)[i], expected[i], 1e-6) << name;
    }
  }
}

// torch::optim over the local shards, against our own AdamW.
TEST(TorchOptim, OverLocalShardsDoesWhatOurOptimizerDoes) {
  ShardOptions options = base_options();
  const Trajectory truth = train(2, options, {.max_grad_norm = kMaxNorm}).course;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Trajectory got;
    ShardOptions own_options = options;
    own_options.param_dtype = dtype;
    own_options.master = MasterPrecision::kF32;
    run_ranks(2, [&](comm::Communicator& own) {
      auto sharded = fully_shard(make_net(), borrow(own), own_options);
      std::vector<at::Tensor> values;
      for (const LocalShard& shard : sharded.local_shards()) values.push_back(shard.value);
      torch::optim::AdamW optimizer(values, torch::optim::AdamWOptions(kRate).weight_decay(0.01));
      for (int step = 0; step < kShortSteps; ++step) {
        Step open = sharded.begin_step(kMicroBatchesOfAll / 2);
        for (int m = own.rank(); m < kMicroBatchesOfAll; m += 2) {
          const MicroBatch batch = micro_batch(step, m);
          open.backward(sharded.run([&](auto& net) { return net.loss(batch.ids, batch.targets); }),
                        batch.ids.numel());
        }
        const StepStats stats =
            open.finish_with({.max_grad_norm = kMaxNorm}, [&] { optimizer.step(); });
        if (own.rank() == 0) got.losses.push_back(stats.loss);
      }
      collect_weights(sharded.core(), got);
    });
    if (dtype == DType::kF32) {
      got.norms = truth.norms;
      expect_close(got, truth, 1e-6, 5e-6);
    } else {
      EXPECT_NEAR(got.losses.back(), truth.losses.back(), 1e-2);
    }
  }
}

TEST(TorchOptim, RefusesASplitMasterWithAHint) {
  ShardOptions options = base_options();
  options.param_dtype = DType::kBF16;
  const std::string text = run_ranks_quietly(1, [&](comm::Communicator& own) {
    fully_shard(make_net(), borrow(own), options).local_shards();
  });
  EXPECT_NE(text.find("MasterPrecision::kF32"), std::string::npos) << text;
}

TEST(Inspection, ShowsWholeParametersAndGradientsByName) {
  at::set_num_threads(1);
  ResidualNet plain = make_net();
  for (int m = 0; m < 2; ++m) {
    const MicroBatch batch = micro_batch(0, m);
    plain->loss(batch.ids, batch.targets).backward();
  }
  run_ranks(2, [&](comm::Communicator& own) {
    auto sharded = fully_shard(make_net(), borrow(own), base_options());
    Step step = sharded.begin_step(1);
    const MicroBatch batch = micro_batch(0, own.rank());
    step.backward(sharded.run([&](auto& net) { return net.loss(batch.ids, batch.targets); }), 1);
    EXPECT_THROW(sharded.full_gradient("head.weight"), ConfigError);
    step.complete_gradients();
    for (const auto& entry : plain->named_parameters()) {
      EXPECT_TRUE(at::equal(sharded.full_parameter(entry.key()), entry.value())) << entry.key();
      EXPECT_TRUE(
          at::allclose(sharded.full_gradient(entry.key()), entry.value().grad(), 1e-4, 1e-6))
          << entry.key();
    }
    EXPECT_THROW(sharded.full_parameter("heat.weight"), ConfigError);
    step.finish({.learning_rate = 0.0});
  });
}

}  // namespace
}  // namespace fsdp::testing
