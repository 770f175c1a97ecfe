// Runs every case of conformance_cases.h on every transport: those of one host, or, with
// FSDP_TEST_GLOO, gloo.
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/fake.h"
#include "libfsdp/comm/host/shm_world.h"
#include "libfsdp/comm/host/thread_world.h"
#include "libfsdp/comm/join.h"
#include "tests/support/rank_processes.h"
#include "tests/support/rank_threads.h"
#include "tests/support/sanitized.h"
#include "tests/unit/comm/conformance_cases.h"

#ifdef FSDP_TEST_GLOO
#include "libfsdp/gloo/transport.h"
#endif

namespace fsdp::comm {
namespace {

constexpr double kPatienceSeconds = fsdp::testing::kSanitized ? 600 : 60;  // For one process.

enum class Transport { kSingle, kFake, kThreads, kShm, kShmInThreads, kGloo, kGlooInThreads };

struct World {
  const char* name;
  Transport transport;
  int size;
};

void PrintTo(const World& world, std::ostream* out) { *out << world.name; }

constexpr World kWorlds[] = {
#ifdef FSDP_TEST_GLOO
    {"Gloo2", Transport::kGloo, 2},
    {"Gloo3", Transport::kGloo, 3},
    {"Gloo4", Transport::kGloo, 4},
    {"GlooInThreads2", Transport::kGlooInThreads, 2},
    {"GlooInThreads3", Transport::kGlooInThreads, 3},
#else
    {"Single", Transport::kSingle, 1},    {"Fake1", Transport::kFake, 1},
    {"Threads2", Transport::kThreads, 2}, {"Threads3", Transport::kThreads, 3},
    {"Threads4", Transport::kThreads, 4}, {"Shm1", Transport::kShm, 1},
    {"Shm2", Transport::kShm, 2},         {"Shm3", Transport::kShm, 3},
    {"Shm4", Transport::kShm, 4},         {"ShmInThreads3", Transport::kShmInThreads, 3},
#endif
};

#ifdef FSDP_TEST_GLOO
bool is_long() {
  const char* scale = std::getenv("FSDP_TEST_SCALE");
  return scale != nullptr && std::string(scale) == "long";
}
#endif

/// All cases that leave the world as it was, one after the other: starting a world of processes
/// with LibTorch takes a second.
void run_all_data_cases(Communicator& c) {
  for (const auto* list : {&data_cases(), &shared_cases()}) {
    for (const ConformanceCase& one : *list) {
      if (one.smallest_world == 1) one.run(c);
    }
  }
}

/// What runs in `world`.
std::vector<ConformanceCase> cases_of(const World& world) {
  std::vector<ConformanceCase> cases;
#ifdef FSDP_TEST_GLOO
  if (world.transport == Transport::kGloo && !is_long()) {
    if (world.size < 4) cases.push_back({"AllDataCases", run_all_data_cases});
    if (world.size == 3) cases.insert(cases.end(), failure_cases().begin(), failure_cases().end());
    return cases;
  }
#endif
  for (const ConformanceCase& one : all_cases()) {
    if (world.size >= one.smallest_world) cases.push_back(one);
  }
  return cases;
}

const ConformanceCase& case_named(const std::string& name) {
  static std::vector<ConformanceCase> all = all_cases();
  all.push_back({"AllDataCases", run_all_data_cases});
  for (const ConformanceCase& one : all) {
    if (one.name == name) return one;
  }
  throw std::runtime_error("no case " + name);
}

/// Ranks of a transport between processes as threads of this process; `join` makes one.
std::string run_in_threads(int size, const ConformanceCase& one,
                           const std::function<std::unique_ptr<Communicator>(int rank)>& join) {
  std::vector<std::string> errors(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      std::unique_ptr<Communicator> communicator;
      try {
        communicator = join(rank);
        one.run(*communicator);
      } catch (const std::exception& e) {
        errors[rank] = cat("rank ", rank, ": ", e.what(), "\n");
        if (communicator) communicator->abort(e.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::string all;
  for (const std::string& error : errors) all += error;
  return all;
}

/// For ThreadSanitizer.
std::string run_shm_in_threads(int size, const ConformanceCase& one) {
  std::vector<RankParts> parts = make_shm_world(size);
  return run_in_threads(size, one,
                        [&](int rank) { return join_shm(std::move(parts[rank]), one.options); });
}

#ifdef FSDP_TEST_GLOO
std::string run_gloo_in_threads(int size, const ConformanceCase& one) {
  ThreadWorld meeting(size);
  return run_in_threads(size, one, [&](int rank) {
    WorldPlace place;
    place.rank = rank;
    place.size = size;
    place.local = meeting.communicator(rank);
    return gloo::transport().join(std::move(place), one.options);
  });
}
#else
std::string run_gloo_in_threads(int, const ConformanceCase&) { return "not built"; }
#endif

std::string run_processes(int size, const ConformanceCase& one, const std::string& comm) {
  auto ranks = testing::start_ranks(size, {testing::this_program()},
                                    {"FSDP_TEST_CASE=" + one.name, "FSDP_COMM=" + comm});
  std::string errors;
  for (int rank = 0; rank < size; ++rank) {
    const std::string status = testing::describe_status(ranks[rank].wait(kPatienceSeconds));
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
      return run_processes(world.size, one, "shm");
    case Transport::kShmInThreads:
      return run_shm_in_threads(world.size, one);
    case Transport::kGloo:
      return run_processes(world.size, one, "gloo");
    case Transport::kGlooInThreads:
      return run_gloo_in_threads(world.size, one);
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
    for (const ConformanceCase& one : cases_of(world)) runs.emplace_back(world, one);
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
#ifdef FSDP_TEST_GLOO
  options.transports = {gloo::transport()};
#endif
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
