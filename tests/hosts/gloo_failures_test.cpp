// What the ranks of several hosts see when one of them fails.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include "libfsdp/base/error.h"
#include "tests/hosts/worlds.h"

namespace fsdp::testing {
namespace {

/// Starts `world` hosts that work, sends `number` to `victim` and returns after how many seconds
/// the last of the others had ended.
double seconds_to_the_end(int world, int victim, int number, const std::string& expected,
                          const std::vector<std::string>& environment = {}) {
  auto hosts = start_hosts(world, "work", environment);
  for (ChildProgram& host : hosts) EXPECT_TRUE(wait_for_text(host, "works", 60)) << host.output();
  usleep(100'000);
  hosts[victim].signal(number);
  const double start = seconds_now();
  for (int rank = 0; rank < world; ++rank) {
    if (rank == victim) continue;
    EXPECT_EQ(describe_status(hosts[rank].wait(30)), "exit 8") << hosts[rank].output();
    const std::string output = hosts[rank].output();
    EXPECT_NE(output.find(expected), std::string::npos) << output;
    EXPECT_NE(output.find("barrier 'step' at step"), std::string::npos) << output;
  }
  return seconds_now() - start;
}

TEST(GlooFailuresTest, AKilledRankIsNoticedWithinTwoSeconds) {
  for (const int victim : {0, 2}) {
    EXPECT_LT(seconds_to_the_end(3, victim, SIGKILL, cat("rank ", victim, " is gone")), 2);
  }
}

TEST(GlooFailuresTest, AStoppedRankIsNoticedAfterThePeerTimeout) {
  for (const int victim : {0, 1}) {
    const std::string expected =
        cat("rank ", victim, " has shown no sign of life for ", is_long() ? "8" : "1.5", " s");
    if (is_long()) {
      EXPECT_LT(seconds_to_the_end(3, victim, SIGSTOP, expected), 10);
    } else {
      EXPECT_LT(seconds_to_the_end(3, victim, SIGSTOP, expected, {"FSDP_PEER_TIMEOUT=1.5"}), 3.5);
    }
  }
}

TEST(GlooFailuresTest, ALongComputationIsNoFailure) {
  auto hosts = start_hosts(2, "compute-long", {"FSDP_PEER_TIMEOUT=1"});
  const std::vector<std::string> lines = digest_lines(2);
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(describe_status(hosts[rank].wait(60)), "exit 0") << hosts[rank].output();
    EXPECT_NE(hosts[rank].output().find(lines[rank]), std::string::npos) << hosts[rank].output();
  }
}

TEST(GlooFailuresTest, AWorldThatIsStoppedAsAWholeGoesOnAfterwards) {
  auto hosts = start_hosts(2, "compute-long", {"FSDP_PEER_TIMEOUT=1"});
  usleep(2'000'000);
  for (const ChildProgram& host : hosts) host.signal(SIGSTOP);
  usleep(3'000'000);
  for (const ChildProgram& host : hosts) host.signal(SIGCONT);
  for (ChildProgram& host : hosts)
    EXPECT_EQ(describe_status(host.wait(60)), "exit 0") << host.output();
}

TEST(GlooFailuresTest, AnotherTokenKeepsARankOut) {
  std::vector<std::string> environment = {"WORLD_SIZE=2",
                                          "LOCAL_WORLD_SIZE=1",
                                          "LOCAL_RANK=0",
                                          "MASTER_ADDR=127.0.0.1",
                                          "RANK=1",
                                          "FSDP_RENDEZVOUS_TOKEN=theirs",
                                          cat("MASTER_PORT=", free_port())};
  ChildProgram stranger({FSDP_WORLD_PROGRAM, "digest"}, environment);
  environment[4] = "RANK=0";
  environment[5] = "FSDP_RENDEZVOUS_TOKEN=ours";
  ChildProgram rank_0({FSDP_WORLD_PROGRAM, "digest"}, environment);
  EXPECT_EQ(describe_status(stranger.wait(60)), "exit 8");
  EXPECT_NE(stranger.output().find("rank 1 was not let in"), std::string::npos)
      << stranger.output();
  EXPECT_TRUE(wait_for_text(rank_0, "token from FSDP_RENDEZVOUS_TOKEN", 20)) << rank_0.output();
  EXPECT_FALSE(rank_0.wait(0.2).has_value());  // It still waits for its own.
}

}  // namespace
}  // namespace fsdp::testing
