#include "tests/ranks/training_run.h"

#include <gtest/gtest.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>
#include <torch/utils.h>

#include <bit>
#include <cmath>
#include <mutex>

#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

// Half-up in magnitude, as the engine rounds: written here by the definition, not by the engine's
// code.
at::Tensor round_half_up(const at::Tensor& master) {
  at::Tensor rounded = master.detach().clone();
  float* values = rounded.data_ptr<float>();
  for (int64_t i = 0; i < rounded.numel(); ++i) {
    values[i] = std::bit_cast<float>((std::bit_cast<uint32_t>(values[i]) + 0x8000U) & 0xffff0000U);
  }
  return rounded.to(at::kBFloat16);
}

void load_masters(ResidualNetImpl& net, const std::vector<at::Tensor>& masters, DType dtype) {
  const at::NoGradGuard no_graph;
  size_t index = 0;
  for (const auto& parameter : net.parameters()) {
    const at::Tensor& master = masters[index++];
    at::Tensor handle = parameter;
    handle.set_data(dtype == DType::kF32 ? master.detach().clone() : round_half_up(master));
  }
}

}  // namespace

ResidualNet make_net() {
  static std::mutex one_at_a_time;  // The default generator is shared by all threads.
  const std::lock_guard lock(one_at_a_time);
  torch::manual_seed(7);
  return ResidualNet(kUnits);
}

MicroBatch micro_batch(int step, int m) {
  const int64_t tokens = 5 + (step + m) % 4;
  std::vector<int64_t> ids, targets;
  for (int64_t t = 0; t < tokens; ++t) {
    ids.push_back((step * 131 + m * 17 + t * 7) % 37);
    targets.push_back((step * 31 + m * 5 + t * 11 + 3) % 37);
  }
  return {at::tensor(ids), at::tensor(targets)};
}

Trajectory train_plainly(int micro_batches, DType dtype) {
  at::set_num_threads(1);
  ResidualNet net = make_net();
  std::vector<at::Tensor> masters;  // What the optimizer updates.
  for (const auto& parameter : net->parameters())
    masters.push_back(parameter.detach().clone().requires_grad_());
  torch::optim::AdamW optimizer(masters, torch::optim::AdamWOptions(kRate).weight_decay(0.01));
  Trajectory result;
  for (int step = 0; step < kSteps; ++step) {
    double loss_sum = 0;
    int64_t tokens = 0;
    load_masters(*net, masters, dtype);
    for (at::Tensor& master : masters) master.mutable_grad() = at::zeros_like(master);
    for (int m = 0; m < micro_batches; ++m) {
      const MicroBatch batch = micro_batch(step, m);
      const at::Tensor loss = net->loss(batch.ids, batch.targets);
      loss.backward();
      for (size_t i = 0; i < masters.size(); ++i) {
        masters[i].mutable_grad().add_(net->parameters()[i].grad().to(at::kFloat));
        net->parameters()[i].mutable_grad() = at::Tensor();
      }
      loss_sum += loss.item<double>();
      tokens += batch.ids.numel();
    }
    for (at::Tensor& master : masters) master.mutable_grad().div_(static_cast<double>(tokens));
    result.norms.push_back(torch::nn::utils::clip_grad_norm_(masters, kMaxNorm));
    result.losses.push_back(loss_sum / static_cast<double>(tokens));
    optimizer.step();
  }
  size_t index = 0;
  for (const auto& entry : net->named_parameters()) {
    const at::Tensor flat = masters[index++].detach().view(-1);
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

void expect_close(const Trajectory& got, const Trajectory& truth, double loss_tolerance,
                  double weight_tolerance) {
  ASSERT_EQ(got.losses.size(), truth.losses.size());
  for (size_t i = 0; i < truth.losses.size(); ++i) {
    EXPECT_NEAR(got.losses[i], truth.losses[i], loss_tolerance * truth.losses[i]) << "step " << i;
    EXPECT_NEAR(got.norms[i], truth.norms[i], 10 * loss_tolerance * truth.norms[i]) << "step " << i;
  }
  for (const auto& [name, expected] : truth.weights) {
    const auto& actual = got.weights.at(name);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      difference += std::pow(double{actual[i]} - expected[i], 2);
      norm += std::pow(double{expected[i]}, 2);
    }
    EXPECT_LE(std::sqrt(difference), weight_tolerance * std::sqrt(norm)) << name;
  }
}

}  // namespace fsdp::testing
