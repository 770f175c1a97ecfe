// Sharded training on a real GPU, one rank over NCCL, against the same on the host.
#include <gtest/gtest.h>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/device/device_transport.h"
#include "libfsdp/comm/host/thread_world.h"
#include "libfsdp/device/cuda_loader.h"
#include "tests/ranks/training_run.h"

namespace fsdp::testing {
namespace {

// Other matrix products: rounding differs, and 20 steps of AdamW multiply it.
constexpr double kLossTolerance = 1e-4;
constexpr double kWeightTolerance = 1e-3;

Trajectory train_on_gpu(const ShardOptions& options, int micro_batches) {
  Trajectory result;
  const auto own = comm::on_device(comm::make_single(), {}, "nccl");
  const at::Device gpu(at::kCUDA, 0);
  auto sharded = fully_shard(make_net(), borrow(*own), options);
  for (int step = 0; step < kSteps; ++step) {
    Step open = sharded.begin_step(micro_batches);
    for (int m = 0; m < micro_batches; ++m) {
      const MicroBatch batch = micro_batch(step, m);
      const at::Tensor loss = sharded.run(
          [&](auto& net) { return net.loss(batch.ids.to(gpu), batch.targets.to(gpu)); });
      open.backward(loss, batch.ids.numel());
    }
    const StepStats stats = open.finish({.learning_rate = kRate, .max_grad_norm = kMaxNorm});
    result.losses.push_back(stats.loss);
    result.norms.push_back(stats.grad_norm);
  }
  collect_weights(sharded.core(), result);
  return result;
}

class GpuTraining : public ::testing::TestWithParam<std::tuple<plan::Strategy, bool>> {
 protected:
  void SetUp() override {
    if (!device::cuda_status().usable) GTEST_SKIP() << device::cuda_status().reason;
  }
};

TEST_P(GpuTraining, FollowsThePlainLoop) {
  ShardOptions options = base_options();
  options.deterministic = false;
  options.strategy = std::get<0>(GetParam());
  options.activation_checkpointing = std::get<1>(GetParam());
  expect_close(train_on_gpu(options, 2), train_plainly(2), kLossTolerance, kWeightTolerance);
}

// With one rank every strategy holds whole parameters; slots come from the option.
INSTANTIATE_TEST_SUITE_P(All, GpuTraining,
                         ::testing::Combine(::testing::Values(plan::Strategy::kFullShard,
                                                              plan::Strategy::kNoShard),
                                            ::testing::Bool()),
                         [](const auto& info) {
                           return cat(plan::strategy_name(std::get<0>(info.param)),
                                      std::get<1>(info.param) ? "Recompute" : "Keep");
                         });

}  // namespace
}  // namespace fsdp::testing
