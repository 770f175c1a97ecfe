// Ranks without a launcher: what the survivors see, and ranks that torchrun would have started.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>

#include "libfsdp/base/error.h"
#include "tests/support/rank_processes.h"

namespace fsdp {
namespace {

using testing::ChildProgram;
using testing::describe_status;
using testing::start_ranks;

double seconds_to_notice(const std::string& output) {
  const auto at = output.find("noticed after ");
  return at == std::string::npos ? 1e9 : std::stod(output.substr(at + 14));
}

TEST(PeerDeathTest, AKilledPeerIsNoticedWithinASecond) {
  for (const int world : {2, 4}) {
    auto ranks = start_ranks(world, {FSDP_RANK_PROGRAM, "lose-by-kill"}, {});
    EXPECT_EQ(describe_status(ranks[1].wait(20)), "SIGKILL");
    for (int rank = 0; rank < world; ++rank) {
      if (rank == 1) continue;
      EXPECT_EQ(describe_status(ranks[rank].wait(20)), "exit 8");
      const std::string output = ranks[rank].output();
      EXPECT_LT(seconds_to_notice(output), 1.1)
          << output;  // The peer lives for the first 0.1 s of the wait.
      EXPECT_NE(output.find("rank 1 is gone: its process has ended"), std::string::npos) << output;
      EXPECT_NE(output.find("barrier 'never' at step 3"), std::string::npos) << output;
    }
  }
}

TEST(PeerDeathTest, AStoppedPeerIsNoticedAfterThePeerTimeout) {
  auto ranks = start_ranks(3, {FSDP_RANK_PROGRAM, "lose-by-stop"}, {"FSDP_PEER_TIMEOUT=1"});
  for (const int rank : {0, 2}) {
    EXPECT_EQ(describe_status(ranks[rank].wait(20)), "exit 8");
    const std::string output = ranks[rank].output();
    EXPECT_GT(seconds_to_notice(output), 0.9) << output;
    EXPECT_LT(seconds_to_notice(output), 4) << output;
    EXPECT_NE(output.find("rank 1 has shown no sign of life for 1 s"), std::string::npos) << output;
  }
}

TEST(PeerDeathTest, ALongComputationIsNoDeath) {
  auto ranks = start_ranks(2, {FSDP_RANK_PROGRAM, "compute-long"}, {"FSDP_PEER_TIMEOUT=1"});
  for (ChildProgram& rank : ranks)
    EXPECT_EQ(describe_status(rank.wait(20)), "exit 0") << rank.output();
}

TEST(PeerDeathTest, AWorldThatIsStoppedAsAWholeGoesOnAfterwards) {
  auto ranks = start_ranks(2, {FSDP_RANK_PROGRAM, "sleep-long"}, {"FSDP_PEER_TIMEOUT=1"});
  while (ranks[0].output().find("working") == std::string::npos) usleep(5000);
  for (int i = 0; i < 4; ++i) {
    usleep(230'000);
    for (const ChildProgram& rank : ranks) rank.signal(SIGSTOP);
    usleep(1'600'000);
    for (const ChildProgram& rank : ranks) rank.signal(SIGCONT);
  }
  for (ChildProgram& rank : ranks)
    EXPECT_EQ(describe_status(rank.wait(20)), "exit 0") << rank.output();
}

TEST(PeerDeathTest, MemoryThatOneRankLacksIsAnErrorOnAllAlike) {
  auto ranks = start_ranks(3, {FSDP_RANK_PROGRAM, "lack-memory"}, {});
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(describe_status(ranks[rank].wait(20)), "exit 0") << ranks[rank].output();
    const std::string output = ranks[rank].output();
    const std::string expected =
        cat("rank ", rank,
            " [comm] no memory for 'gradients', 8388608 bytes for each of 3 ranks:\n  rank 1: ");
    EXPECT_NE(output.find(expected), std::string::npos) << output;
  }
}

std::vector<ChildProgram> start_foreign(int world, const std::string& port, const std::string& mode,
                                        const std::vector<std::string>& more = {}) {
  std::vector<ChildProgram> ranks;
  for (int rank = world - 1; rank >= 0; --rank) {  // The host of the meeting comes last.
    std::vector<std::string> environment = {cat("RANK=", rank),       cat("WORLD_SIZE=", world),
                                            cat("LOCAL_RANK=", rank), "OMP_NUM_THREADS=1",
                                            "MASTER_ADDR=127.0.0.1",  "MASTER_PORT=" + port};
    environment.push_back(cat("LOCAL_WORLD_SIZE=", world));
    for (const std::string& entry : more) environment.insert(environment.begin(), entry);
    ranks.emplace_back(std::vector<std::string>{FSDP_RANK_PROGRAM, mode}, environment);
  }
  std::reverse(ranks.begin(), ranks.end());
  return ranks;
}

TEST(PeerDeathTest, RanksOfAnotherLauncherFindEachOther) {
  const std::string port = std::to_string(getpid());
  auto ranks = start_foreign(3, port, "greet");
  auto others = start_foreign(2, port + "1", "greet");
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(describe_status(ranks[rank].wait(20)), "exit 0") << ranks[rank].output();
    EXPECT_NE(ranks[rank].output().find(cat("rank ", rank, " of 3 sum 6 ")), std::string::npos)
        << ranks[rank].output();
  }
  for (ChildProgram& rank : others)
    EXPECT_EQ(describe_status(rank.wait(20)), "exit 0") << rank.output();
}

TEST(PeerDeathTest, ARankOfAnotherLauncherPrintsItsOwnError) {
  auto ranks = start_foreign(2, std::to_string(getpid()), "throw");
  EXPECT_EQ(describe_status(ranks[1].wait(20)), "exit 3");
  EXPECT_EQ(ranks[1].output(), "finetune: rank 1: train.jsonl:7:\n  no known key\n");
  EXPECT_EQ(describe_status(ranks[0].wait(20)), "exit 8");
  EXPECT_NE(ranks[0].output().find("finetune: rank 0: [comm] rank 1 failed: train.jsonl:7:"),
            std::string::npos)
      << ranks[0].output();
}

TEST(PeerDeathTest, RanksOfSeveralHostsAreRefused) {
  auto ranks = start_foreign(2, std::to_string(getpid()), "greet", {"LOCAL_WORLD_SIZE=1"});
  for (ChildProgram& rank : ranks) {
    EXPECT_EQ(describe_status(rank.wait(20)), "exit 2");
    EXPECT_NE(rank.output().find("this program was built for one host"), std::string::npos)
        << rank.output();
  }
}

TEST(PeerDeathTest, AContradictoryEnvironmentIsAConfigError) {
  ChildProgram no_rank({FSDP_RANK_PROGRAM, "greet"}, {"WORLD_SIZE=2"});
  EXPECT_EQ(describe_status(no_rank.wait(20)), "exit 2");
  EXPECT_EQ(no_rank.output(), "finetune: [comm] WORLD_SIZE=2 but RANK is not set\n");
  ChildProgram no_number({FSDP_RANK_PROGRAM, "greet"}, {"WORLD_SIZE=two"});
  EXPECT_EQ(describe_status(no_number.wait(20)), "exit 2");
  ChildProgram bad_timeout({FSDP_RANK_PROGRAM, "greet"}, {"FSDP_LAUNCH_FD=77"});
  EXPECT_EQ(describe_status(bad_timeout.wait(20)), "exit 2");
  EXPECT_NE(bad_timeout.output().find("FSDP_LAUNCH_FD=77 is no open file"), std::string::npos)
      << bad_timeout.output();
}

}  // namespace
}  // namespace fsdp
