// Sharded training whose memory is on devices: a stand-in's (tests/support/cuda_stand_in.cpp). The
// same bits as on the host.
#include <gtest/gtest.h>

#include <cstdlib>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/device/device_transport.h"
#include "libfsdp/comm/host/thread_world.h"
#include "tests/ranks/training_run.h"

namespace fsdp::testing {
namespace {

// Before anything asks for CUDA.
const bool kUsesStandIn = setenv("FSDP_CUDA_LIBRARY", FSDP_CUDA_STAND_IN, 1) == 0;

void train_rank(comm::Communicator& own, int micro_batches, const ShardOptions& options,
                Trajectory& result) {
  auto sharded = fully_shard(make_net(), borrow(own), options);
  for (int step = 0; step < kSteps; ++step) {
    const int mine = (micro_batches - own.rank() + own.size() - 1) / own.size();
    Step open = sharded.begin_step(mine);
    for (int a = 0; a < mine; ++a) {
      const MicroBatch batch = micro_batch(step, a * own.size() + own.rank());
      const at::Tensor loss =
          sharded.run([&](auto& net) { return net.loss(batch.ids, batch.targets); });
      open.backward(loss, batch.ids.numel());
    }
    const StepStats stats = open.finish({.learning_rate = kRate, .max_grad_norm = kMaxNorm});
    if (own.rank() != 0) continue;
    result.losses.push_back(stats.loss);
    result.norms.push_back(stats.grad_norm);
  }
  collect_weights(sharded.core(), result);
}

Trajectory train_on_device(const std::string& transport, int ranks, int micro_batches,
                           const ShardOptions& options) {
  Trajectory result;
  comm::ThreadWorld world(ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      std::unique_ptr<comm::Communicator> own;
      try {
        own = comm::on_device(world.communicator(rank), {}, transport);
        train_rank(*own, micro_batches, options, result);
      } catch (const std::exception& e) {
        ADD_FAILURE() << "rank " << rank << ": " << e.what();
        if (own) own->abort(e.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return result;
}

struct Case {
  const char* name;
  plan::Strategy strategy;
  int ranks;
  DType dtype = DType::kF32;
  int group = 0;
  plan::Offload offload = plan::Offload::kNone;
};

class DeviceTraining : public ::testing::TestWithParam<std::tuple<const char*, Case>> {};

TEST_P(DeviceTraining, HasTheBitsOfTheHost) {
  const auto& [transport, one] = GetParam();
  ShardOptions options = base_options();
  options.strategy = one.strategy;
  options.param_dtype = one.dtype;
  options.placement.sharding_group_size = one.group;
  options.placement.force_slot_home = true;
  options.placement.offload = one.offload;
  options.deterministic = true;
  const int micro_batches = 2 * one.ranks - 1;
  const Trajectory host = train_sharded(one.ranks, micro_batches, options);
  const Trajectory device = train_on_device(transport, one.ranks, micro_batches, options);
  EXPECT_EQ(device.losses, host.losses);
  EXPECT_EQ(device.norms, host.norms);
  EXPECT_EQ(device.weights, host.weights);
}

INSTANTIATE_TEST_SUITE_P(
    All, DeviceTraining,
    ::testing::Combine(
        ::testing::Values("nccl", "cuda_ipc"),
        ::testing::Values(Case{"Full2", plan::Strategy::kFullShard, 2},
                          Case{"Full3Bf16", plan::Strategy::kFullShard, 3, DType::kBF16},
                          Case{"GradOp2", plan::Strategy::kShardGradOp, 2},
                          Case{"Hybrid4", plan::Strategy::kHybridShard, 4, DType::kF32, 2},
                          Case{"None2", plan::Strategy::kNoShard, 2},
                          Case{"OffloadedParameters2", plan::Strategy::kFullShard, 2, DType::kBF16,
                               0, plan::Offload::kParameters},
                          Case{"OffloadedOptimizer2", plan::Strategy::kFullShard, 2, DType::kF32, 0,
                               plan::Offload::kOptimizer})),
    [](const auto& info) {
      return cat(std::get<0>(info.param), "_", std::get<1>(info.param).name);
    });

TEST(DeviceTrainingFast, FollowsThePlainLoopWhereSumsHaveNoOrder) {
  ShardOptions options = base_options();
  options.deterministic = false;
  expect_close(train_on_device("nccl", 4, 4, options), train_plainly(4), 1e-6, 5e-6);
  options.strategy = plan::Strategy::kHybridShard;
  options.placement.sharding_group_size = 2;
  expect_close(train_on_device("nccl", 4, 4, options), train_plainly(4), 1e-6, 5e-6);
  options.placement.two_level = true;
  for (const plan::Offload offload : {plan::Offload::kNone, plan::Offload::kParameters}) {
    options.placement.offload = offload;
    expect_close(train_on_device("nccl", 4, 4, options), train_plainly(4), 1e-6, 5e-6);
  }
}

}  // namespace
}  // namespace fsdp::testing
