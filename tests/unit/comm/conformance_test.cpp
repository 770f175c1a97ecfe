// Runs every case of conformance_cases.h on every transport.
#include <gtest/gtest.h>

#include <cstdlib>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/fake.h"
#include "libfsdp/comm/join.h"
#include "libfsdp/comm/shm_world.h"
#include "libfsdp/comm/thread_world.h"
#include "tests/support/rank_processes.h"
#include "tests/support/rank_threads.h"
#include "tests/unit/comm/conformance_cases.h"

namespace fsdp::comm {
namespace {

enum class Transport { kSingle, kFake, kThreads, kShm, kShmInThreads };

struct World {
  const char* name;
  Transport transport;
  int size;
};

void PrintTo(const World& world, std::ostream* out) { *out << world.name; }

constexpr World kWorlds[] = {
    {"Single", Transport::kSingle, 1},    {"Fake1", Transport::kFake, 1},
    {"Threads2", Transport::kThreads, 2}, {"Threads3", Transport::kThreads, 3},
    {"Threads4", Transport::kThreads, 4}, {"Shm1", Transport::kShm, 1},
    {"Shm2", Transport::kShm, 2},         {"Shm3", Transport::kShm, 3},
    {"Shm4", Transport::kShm, 4},         {"ShmInThreads3", Transport::kShmInThreads, 3},
};

const ConformanceCase& case_named(const std::string& name) {
  static const std::vector<ConformanceCase> all = all_cases();
  for (const ConformanceCase& one : all) {
    if (one.name == name) return one;
  }
  throw std::runtime_error("no case " + name);
}

/// Ranks of the process transport as threads of this process, for ThreadSanitizer.
std::string run_shm_in_threads(int size, const ConformanceCase& one) {
  std::vector<RankParts> parts = make_shm_world(size);
  std::vector<std::string> errors(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      const auto communicator = join_shm(std::move(parts[rank]), one.options);
      try {
        one.run(*communicator);
      } catch (const std::exception& e) {
        errors[rank] = cat("rank ", rank, ": ", e.what(), "\n");
        communicator->abort(e.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::string all;
  for (const std::string& error : errors) all += error;
  return all;
}

std::string run_processes(int size, const ConformanceCase& one) {
  auto ranks =
      testing::start_ranks(size, {testing::this_program()}, {"FSDP_TEST_CASE=" + one.name});
  std::string errors;
  for (int rank = 0; rank < size; ++rank) {
    const std::string status = testing::describe_status(ranks[rank].wait(60));
    if (status != "exit 0") errors += cat("rank ", rank, " (", status, "): ", ranks[rank].output());
  }
  return errors;
}

std::string run_case(const World& world, const ConformanceCase& one) {
  switch (world.transport) {
    case Transport::kSingle:
      one.run(*make_single());
      return {};
    case Transport::kFake:
      one.run(*make_fake(0, 1, {.can_share = true}));
      return {};
    case Transport::kThreads:
      return testing::run_ranks_quietly(world.size, one.run, one.options);
    case Transport::kShm:
      return run_processes(world.size, one);
    case Transport::kShmInThreads:
      return run_shm_in_threads(world.size, one);
  }
  return "no such transport";
}

class ConformanceTest : public ::testing::TestWithParam<std::tuple<World, ConformanceCase>> {};

TEST_P(ConformanceTest, Holds) {
  const auto& [world, one] = GetParam();
  EXPECT_EQ(run_case(world, one), "");
}

std::vector<std::tuple<World, ConformanceCase>> all_runs() {
  std::vector<std::tuple<World, ConformanceCase>> runs;
  for (const World& world : kWorlds) {
    for (const ConformanceCase& one : all_cases()) {
      if (world.size >= one.smallest_world) runs.emplace_back(world, one);
    }
  }
  return runs;
}

INSTANTIATE_TEST_SUITE_P(AllTransports, ConformanceTest, ::testing::ValuesIn(all_runs()),
                         [](const auto& info) {
                           return cat(std::get<0>(info.param).name, std::get<1>(info.param).name);
                         });

int run_as_rank(const char* name) {
  const ConformanceCase& one = case_named(name);
  JoinOptions options;
  options.comm = one.options;
  try {
    const auto communicator = join(options);
    try {
      one.run(*communicator);
      return 0;
    } catch (const std::exception& e) {
      std::fprintf(stderr, "rank %d: %s\n", communicator->rank(), e.what());
      communicator->abort(e.what());
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "joining: %s\n", e.what());
  }
  return 1;
}

}  // namespace
}  // namespace fsdp::comm

int main(int argc, char** argv) {
  if (const char* name = std::getenv("FSDP_TEST_CASE")) return fsdp::comm::run_as_rank(name);
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
