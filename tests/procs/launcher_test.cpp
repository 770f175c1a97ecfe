// Starts a real launcher with real ranks and looks at exit codes, last lines and what is left
// behind.
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

#include "libfsdp/base/error.h"
#include "tests/support/rank_processes.h"

namespace fsdp {
namespace {

using testing::ChildProgram;
using testing::describe_status;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Processes that carry this run's mark in their environment, the ranks and whatever they started.
std::vector<pid_t> marked_processes(const std::string& mark) {
  std::vector<pid_t> found;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string name = entry.path().filename();
    if (name.find_first_not_of("0123456789") != std::string::npos) continue;
    std::ifstream in(entry.path() / "environ", std::ios::binary);
    const std::string environment((std::istreambuf_iterator<char>(in)), {});
    if (environment.find(mark) != std::string::npos) found.push_back(std::stoi(name));
  }
  return found;
}

class LauncherTest : public ::testing::Test {
 protected:
  LauncherTest() : mark_(cat("FSDP_TEST_MARK=", getpid(), "_", counter_++)) {}

  ChildProgram launch(const std::string& mode, int ranks = 2,
                      std::vector<std::string> environment = {}) {
    environment.push_back(mark_);
    return ChildProgram({FSDP_RANK_PROGRAM, "--launch", std::to_string(ranks), mode}, environment);
  }

  /// Runs to the end: status, and the last line of the output.
  std::string run(const std::string& mode, int ranks = 2,
                  std::vector<std::string> environment = {}) {
    ChildProgram launcher = launch(mode, ranks, std::move(environment));
    return ending_of(launcher);
  }

  std::string ending_of(ChildProgram& launcher) {
    const std::string status = describe_status(launcher.wait(30));
    output_ = launcher.output();
    std::string text = output_;
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return cat(status, " | ", text.substr(text.rfind('\n') + 1));
  }

  static void wait_for_output(const ChildProgram& launcher, const std::string& text) {
    const auto start = Clock::now();
    while (launcher.output().find(text) == std::string::npos) {
      ASSERT_LT(seconds_since(start), 30) << launcher.output();
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }

  std::vector<pid_t> ranks_of(const ChildProgram& launcher) const {
    std::vector<pid_t> ranks;
    for (const pid_t pid : marked_processes(mark_)) {
      if (pid != launcher.pid()) ranks.push_back(pid);
    }
    return ranks;
  }

  /// Nothing of the run exists within `timeout_s`.
  void expect_nothing_left(double timeout_s = 0) const {
    const auto start = Clock::now();
    while (!marked_processes(mark_).empty() && seconds_since(start) < timeout_s) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    EXPECT_EQ(marked_processes(mark_).size(), 0U);
  }

  std::string mark_;
  std::string output_;
  static inline int counter_ = 0;
};

TEST_F(LauncherTest, RanksGetTheirPlacesAndEndWell) {
  run("greet", 3, {"OMP_NUM_THREADS=5"});
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_NE(output_.find(cat("rank ", rank, " of 3 sum 6 threads 5 local ", rank, "/3\n")),
              std::string::npos)
        << output_;
  }
  EXPECT_TRUE(run("greet", 1).starts_with("exit 0 | rank 0 of 1 sum 1"));
  expect_nothing_left();
}

TEST_F(LauncherTest, ARanksErrorIsTheLastLineAndItsCodeTheExitCode) {
  EXPECT_EQ(run("throw", 3),
            "exit 3 | finetune: rank 1: train.jsonl:7: no known key (at step 12, phase forward)");
  EXPECT_EQ(
      run("bad-alloc"),
      "exit 7 | finetune: rank 1: out of host memory (at step 12, phase forward, after barrier "
      "'ready')");
  EXPECT_EQ(run("throw-in-thread"),
            "exit 1 | finetune: rank 1: boom in a thread (thrown where nobody catches it) (at step "
            "12, phase forward, after barrier 'ready')");
  expect_nothing_left();
}

TEST_F(LauncherTest, ARankThatEndsWithoutAWordIsNamed) {
  EXPECT_EQ(run("segfault"),
            "exit 8 | finetune: rank 1 was killed by SIGSEGV at step 12, phase forward, after "
            "barrier 'ready'");
  EXPECT_EQ(run("exit-3"),
            "exit 3 | finetune: rank 1 ended with exit code 3 at step 12, phase forward, after "
            "barrier 'ready'");
  EXPECT_EQ(run("exit-0-early"),
            "exit 8 | finetune: rank 1 ended with exit code 0 at step 12, phase forward, after "
            "barrier 'ready'; rank 0 waited for it in barrier 'next' at step 12");
  expect_nothing_left();
}

TEST_F(LauncherTest, AKilledRankEndsAllWithinTwoSeconds) {
  for (int trial = 0; trial < 3; ++trial) {
    ChildProgram launcher = launch("work");
    wait_for_output(launcher, "working");
    std::this_thread::sleep_for(std::chrono::milliseconds(60 * trial));
    const auto ranks = ranks_of(launcher);
    ASSERT_EQ(ranks.size(), 2U);
    const auto start = Clock::now();
    kill(ranks[trial % 2], SIGKILL);
    const std::string ending = ending_of(launcher);
    EXPECT_LT(seconds_since(start), 2);
    EXPECT_TRUE(ending.starts_with("exit 8 | finetune: rank ")) << ending;
    EXPECT_NE(ending.find(" was killed by SIGKILL at step "), std::string::npos) << ending;
    EXPECT_NE(ending.find(", phase backward"), std::string::npos) << ending;
    expect_nothing_left();
  }
}

TEST_F(LauncherTest, ARankThatHangsIsKilledAfterTheGrace) {
  const auto start = Clock::now();
  EXPECT_EQ(run("hang-on-failure", 3), "exit 9 | finetune: rank 1: loss is NaN");
  EXPECT_LT(seconds_since(start), 3);
  expect_nothing_left();
}

TEST_F(LauncherTest, RanksEndWhenTheLauncherIsKilled) {
  ChildProgram launcher = launch("work", 3);
  wait_for_output(launcher, "working");
  ASSERT_EQ(ranks_of(launcher).size(), 3U);
  launcher.signal(SIGKILL);
  EXPECT_EQ(describe_status(launcher.wait(5)), "SIGKILL");
  expect_nothing_left(2);
}

TEST_F(LauncherTest, AStoppedRankIsAFailureAfterThePeerTimeout) {
  ChildProgram launcher = launch("work", 2, {"FSDP_PEER_TIMEOUT=1"});
  wait_for_output(launcher, "working");
  const auto start = Clock::now();
  kill(ranks_of(launcher).at(0), SIGSTOP);
  const std::string ending = ending_of(launcher);
  EXPECT_LT(seconds_since(start), 4);
  EXPECT_TRUE(ending.starts_with("exit 8 | finetune: rank ")) << ending;
  EXPECT_NE(ending.find(" was stopped by SIGSTOP for 1 s at step "), std::string::npos) << ending;
  expect_nothing_left();
}

TEST_F(LauncherTest, SignalsAreHandedOnAndTheCheckpointIsWaitedFor) {
  for (const int number : {SIGTERM, SIGINT, SIGUSR1}) {
    ChildProgram launcher = launch("stop-with-checkpoint");
    wait_for_output(launcher, "working");
    launcher.signal(number);
    EXPECT_TRUE(ending_of(launcher).starts_with("exit 75 | rank ")) << output_;
    for (int rank = 0; rank < 2; ++rank) {
      EXPECT_NE(output_.find(cat("rank ", rank, " got ", number, "\n")), std::string::npos)
          << output_;
    }
    expect_nothing_left();
  }
}

TEST_F(LauncherTest, AnInterruptWithNothingSavedIs130) {
  ChildProgram in_order = launch("stop-without");
  wait_for_output(in_order, "working");
  in_order.signal(SIGINT);
  EXPECT_EQ(ending_of(in_order), "exit 130 | finetune: interrupted by SIGINT, nothing saved");
  ChildProgram without_handler = launch("work");
  wait_for_output(without_handler, "working");
  without_handler.signal(SIGINT);
  EXPECT_EQ(ending_of(without_handler),
            "exit 130 | finetune: interrupted by SIGINT, nothing saved");
  expect_nothing_left();
}

TEST_F(LauncherTest, TheThirdInterruptKills) {
  ChildProgram launcher = launch("hang-on-failure", 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  // Signals that come before the launcher is given a core count once.
  for (int i = 0; i < 100 && !launcher.wait(0.05); ++i) launcher.signal(SIGTERM);
  EXPECT_EQ(ending_of(launcher), "exit 130 | finetune: interrupted, nothing saved");
  expect_nothing_left();
}

TEST_F(LauncherTest, WhatARankLeavesBehindIsKilled) {
  EXPECT_TRUE(run("leave-a-child").starts_with("exit 0"));
  expect_nothing_left(1);
}

TEST_F(LauncherTest, AProgramThatCannotStartIsAConfigError) {
  ChildProgram launcher({FSDP_RANK_PROGRAM, "--launch-missing", "2", "greet"}, {mark_});
  const std::string ending = ending_of(launcher);
  EXPECT_TRUE(ending.starts_with("exit 2 | finetune: rank ")) << ending;
  EXPECT_TRUE(ending.ends_with(": cannot start '/nowhere/program': No such file or directory"))
      << ending;
  expect_nothing_left();
}

}  // namespace
}  // namespace fsdp
