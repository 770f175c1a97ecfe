// NCCL and CUDA IPC over a stand-in for the device (tests/support/cuda_stand_in.cpp): ranks are
// threads, device memory is the host's.
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/device/device_transport.h"
#include "libfsdp/comm/fold_parts.h"
#include "libfsdp/comm/host/thread_world.h"
#include "libfsdp/kernels/compute.h"
#include "tests/support/device_cases.h"
#include "tests/unit/comm/conformance_cases.h"

namespace fsdp::comm {
namespace {

// Before anything asks for CUDA.
const bool kUsesStandIn = setenv("FSDP_CUDA_LIBRARY", FSDP_CUDA_STAND_IN, 1) == 0;

/// Passes everything on to a communicator that lives longer.
std::unique_ptr<Communicator> wrap(ThreadWorld& world, int rank, const char* name,
                                   const CommOptions& options) {
  return on_device(world.communicator(rank), options, name);
}

/// Texts of the ranks' errors, empty where all is well.
std::string run_on_device(int size, const char* name, const CommOptions& options,
                          const std::function<void(Communicator&)>& fn) {
  ThreadWorld world(size, options);
  std::vector<std::string> errors(static_cast<size_t>(size));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      std::unique_ptr<Communicator> communicator;
      try {
        communicator = wrap(world, rank, name, options);
        fn(*communicator);
      } catch (const std::exception& e) {
        errors[static_cast<size_t>(rank)] = cat("rank ", rank, ": ", e.what(), "\n");
        if (communicator) communicator->abort(e.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::string all;
  for (const std::string& error : errors) all += error;
  return all;
}

struct World {
  const char* name;
  const char* transport;
  int size;
};
void PrintTo(const World& world, std::ostream* out) { *out << world.name; }
constexpr World kWorlds[] = {{"Nccl1", "nccl", 1},        {"Nccl2", "nccl", 2},
                             {"Nccl3", "nccl", 3},        {"Nccl4", "nccl", 4},
                             {"CudaIpc1", "cuda_ipc", 1}, {"CudaIpc2", "cuda_ipc", 2},
                             {"CudaIpc3", "cuda_ipc", 3}};

class DeviceConformanceTest : public ::testing::TestWithParam<std::tuple<World, ConformanceCase>> {
};

TEST_P(DeviceConformanceTest, Holds) {
  const auto& [world, one] = GetParam();
  EXPECT_EQ(run_on_device(world.size, world.transport, one.options, one.run), "");
}

std::vector<std::tuple<World, ConformanceCase>> all_runs() {
  std::vector<std::tuple<World, ConformanceCase>> runs;
  for (const World& world : kWorlds) {
    for (const ConformanceCase& one : data_cases()) {
      if (world.size >= one.smallest_world) runs.emplace_back(world, one);
    }
    // NCCL finds divergence when the ranks exchange, not at the collective.
    if (std::string_view(world.transport) == "nccl") continue;
    for (const ConformanceCase& one : divergence_cases()) {
      if (world.size >= one.smallest_world) runs.emplace_back(world, one);
    }
  }
  return runs;
}
INSTANTIATE_TEST_SUITE_P(AllTransports, DeviceConformanceTest, ::testing::ValuesIn(all_runs()),
                         [](const auto& info) {
                           return cat(std::get<0>(info.param).name, std::get<1>(info.param).name);
                         });

/// Folds small integers, whose sums are exact in any order and type.
void fold_integers(Communicator& c, int shard, DType dtype, bool accumulate) {
  constexpr int64_t kPart = 768;
  const int64_t numel = kPart * shard;
  const auto memory = c.allocate(static_cast<size_t>(numel) * 4, "gradients");
  std::vector<float> values(static_cast<size_t>(numel));
  for (int64_t i = 0; i < numel; ++i)
    values[static_cast<size_t>(i)] = static_cast<float>((c.rank() + 1) * (i % 7));
  c.compute().write_floats(values, memory->local(), dtype);
  const kernels::ComputeMemory sums = c.compute().allocate(kPart * sizeof(float), "sums");
  std::vector<float> before(kPart, 5.0F);
  c.compute().write(sums.get(), before.data(), kPart * sizeof(float));
  auto* const place = reinterpret_cast<float*>(sums.get());
  const int64_t begin = c.rank() % shard * kPart;
  for (int round = 0; round < 3; ++round) {
    c.finish(c.begin_fold(c.world(),
                          {memory.get(), 0, static_cast<size_t>(numel) * dtype_bytes(dtype)}, dtype,
                          begin, {place, kPart}, accumulate, make_tag("fold", round)));
  }
  std::vector<float> got(kPart);
  c.compute().read(place, got.data(), kPart * sizeof(float));
  const auto ranks = static_cast<float>(c.size() * (c.size() + 1) / 2);
  for (int64_t i = 0; i < kPart; ++i) {
    const float sum = ranks * static_cast<float>((begin + i) % 7);
    expect(got[static_cast<size_t>(i)] == (accumulate ? 5.0F + 3 * sum : sum), cat("sum ", i));
  }
}

TEST(Nccl, FoldsByScatterAndReplicasInAnyOrder) {
  for (const auto& [size, shard] :
       {std::pair(2, 2), std::pair(4, 4), std::pair(4, 2), std::pair(4, 1), std::pair(1, 1)}) {
    SCOPED_TRACE(cat(size, " ranks, ", shard, " parts"));
    EXPECT_EQ(run_on_device(size, "nccl", {},
                            [shard = shard](Communicator& c) {
                              c.allow_any_order(true);
                              for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
                                fold_integers(c, shard, dtype, false);
                                fold_integers(c, shard, dtype, true);
                              }
                            }),
              "");
  }
}

TEST(Nccl, NamesBothSidesOfADivergenceBeforeAPacketIsUsed) {
  const std::string text = run_on_device(2, "nccl", {}, [](Communicator& c) {
    c.name_units(std::vector<std::string>{"(root)", "layers.0", "layers.1"});
    const auto memory = c.allocate(64, "shards");
    std::vector<std::byte> all(64 * static_cast<size_t>(c.size()));
    const int unit = c.rank() == 0 ? 1 : 2;
    c.finish(
        c.begin_gather(c.world(), {memory.get(), 0, 64}, all.data(), make_tag("gather", 7, unit)));
    int64_t packet = 0;
    std::vector<int64_t> packets(static_cast<size_t>(c.size()));
    c.exchange(&packet, sizeof(packet), packets.data(), make_tag("step packet", 7));
  });
  EXPECT_NE(text.find("unit 'layers.0' at step 7"), std::string::npos) << text;
  EXPECT_NE(text.find("unit 'layers.1' at step 7"), std::string::npos) << text;
  EXPECT_NE(text.find("different collectives before step packet: "), std::string::npos) << text;
}

TEST(Nccl, ItsWatchdogEndsACollectiveThatARankDoesNotJoin) {
  CommOptions options;
  options.timeout_s = 0.3;
  const std::string text = run_on_device(2, "nccl", options, [](Communicator& c) {
    const auto memory = c.allocate(64, "shards");
    std::vector<std::byte> all(64 * static_cast<size_t>(c.size()));
    if (c.rank() == 1) return std::this_thread::sleep_for(std::chrono::seconds(1));
    c.finish(
        c.begin_gather(c.world(), {memory.get(), 0, 64}, all.data(), make_tag("gather", 7, 3)));
    c.finish(
        c.begin_gather(c.world(), {memory.get(), 0, 64}, all.data(), make_tag("gather", 7, 4)));
  });
  EXPECT_NE(text.find("gather of unit 3 at step 7"), std::string::npos) << text;
  EXPECT_NE(text.find("waited for 0.3 s on the device"), std::string::npos) << text;
}

TEST(Nccl, ItsWatchdogAsksTheHostAfterARankThatHasLeft) {
  const auto begin = std::chrono::steady_clock::now();
  const std::string text = run_on_device(3, "nccl", {}, [](Communicator& c) {
    const auto memory = c.allocate(64, "shards");
    std::vector<std::byte> all(64 * static_cast<size_t>(c.size()));
    if (c.rank() == 1) return;
    for (const int unit : {3, 4}) {
      c.finish(c.begin_gather(c.world(), {memory.get(), 0, 64}, all.data(),
                              make_tag("gather", 7, unit)));
    }
  });
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(2));
  EXPECT_NE(text.find("gather of unit 3 at step 7"), std::string::npos) << text;
  EXPECT_NE(text.find("rank 1 has left"), std::string::npos) << text;
}

TEST(Nccl, RefusesAPartThatChanges) {
  const std::string text = run_on_device(1, "nccl", {}, [](Communicator& c) {
    const auto memory = c.allocate(64, "gradients");
    std::vector<float> sums(16);
    c.finish(c.begin_fold(c.world(), {memory.get(), 0, 64}, DType::kF32, 0, {sums.data(), 8}, false,
                          make_tag("fold")));
    c.finish(c.begin_fold(c.world(), {memory.get(), 0, 64}, DType::kF32, 8, {sums.data(), 8}, false,
                          make_tag("fold")));
  });
  EXPECT_NE(text.find("parts may not change"), std::string::npos) << text;
}

TEST(DeviceTransport, TakesNcclForACardARankAndIpcForSharedCards) {
  const auto kind = [](int size) {
    std::string name;
    EXPECT_EQ(run_on_device(size, "", {},
                            [&](Communicator& c) {
                              // Only NCCL's memory is not mapped by the peers.
                              const bool mapped = c.allocate(64, "block")->peer(0) != nullptr;
                              if (c.rank() == 0) name = mapped ? "cuda_ipc" : "nccl";
                            }),
              "");
    return name;
  };
  setenv("FSDP_STAND_IN_DEVICES", "2", 1);
  EXPECT_EQ(kind(2), "nccl");
  unsetenv("FSDP_STAND_IN_DEVICES");
  EXPECT_TRUE(host_has_gpu());
}

// In a process of its own: whether default streams queue is found out once.
TEST(DeviceTransport, OrdersAllThatTheComputeStreamHolds) {
  ::testing::GTEST_FLAG(death_test_style) = "threadsafe";
  for (const char* transport : {"nccl", "cuda_ipc"}) {
    for (const int size : {1, 3}) {
      SCOPED_TRACE(cat(transport, " ", size));
      EXPECT_EXIT(
          {
            setenv("FSDP_STAND_IN_QUEUES", "1", 1);
            const std::string text =
                run_on_device(size, transport, {}, fsdp::testing::gather_and_fold);
            std::fprintf(stderr, "%s", text.c_str());
            std::fflush(stderr);
            _exit(text.empty() ? 0 : 1);
          },
          ::testing::ExitedWithCode(0), "");
    }
  }
}

TEST(FoldParts, TilesAreScatteredAmongReplicas) {
  const FoldTiles tiles = tiles_of({0, 1, 2, 3}, {{0, 4}, {4, 4}, {0, 4}, {4, 4}}, 8, 3);
  EXPECT_EQ(tiles.scatter, (Group{2, 3}));
  EXPECT_EQ(tiles.replicas, (Group{1, 3}));
  EXPECT_TRUE(tiles_of({0, 1}, {{4, 4}, {0, 4}}, 8, 0).scatter.empty());  // Not in rank order.
  EXPECT_TRUE(tiles_of({0, 1}, {{0, 4}, {0, 4}}, 8, 0).scatter.empty());  // A part is missing.
  EXPECT_TRUE(tiles_of({0, 1}, {{0, 5}, {5, 3}}, 8, 0).scatter.empty());  // Unequal.
}

}  // namespace
}  // namespace fsdp::comm
