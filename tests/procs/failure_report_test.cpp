// What a failure's report says: the first cause among several failures, and what the others did.
#include <gtest/gtest.h>
#include <signal.h>

#include <regex>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/host/thread_world.h"
#include "libfsdp/comm/launch/failure_log.h"
#include "libfsdp/comm/os/mapping.h"
#include "tests/support/rank_processes.h"

namespace fsdp {
namespace {

using comm::ControlView;
using comm::Failure;
using comm::FailureLog;
using comm::Presence;
using testing::ChildProgram;
using testing::describe_status;
using testing::start_ranks;

class FailureLogTest : public ::testing::Test {
 protected:
  FailureLogTest()
      : memory_(comm::Mapping::anonymous(ControlView::bytes(4))),
        control_(ControlView::create(memory_->data(), 4)) {
    for (int rank = 0; rank < 4; ++rank) control_.rank(rank).presence = Presence::kJoined;
  }
  void add(int rank, bool consequence, int64_t at_ns, const std::string& text, int code = 8) {
    log_.add(
        control_,
        {.rank = rank, .code = code, .consequence = consequence, .at_ns = at_ns, .text = text});
  }
  std::string cause() const {
    const Failure found = *log_.cause(control_);
    return cat("rank ", found.rank, found.text);
  }

  std::shared_ptr<comm::Mapping> memory_;
  ControlView control_;
  FailureLog log_;
};

TEST_F(FailureLogTest, WithoutFailureThereIsNoCause) {
  EXPECT_FALSE(log_.cause(control_).has_value());
  EXPECT_TRUE(log_.empty());
}

TEST_F(FailureLogTest, TheEarliestOwnFailureIsTheCauseHoweverTheyArrive) {
  add(0, true, 30, ": lost rank 2");
  add(1, false, 20, " was killed");
  add(2, false, 10, ": bad data", 3);
  EXPECT_EQ(cause(), "rank 2: bad data");
}

TEST_F(FailureLogTest, TheFailureOfWhoWasMissedIsTheCauseEvenIfItIsSeenLate) {
  control_.abort(0, "[comm] rank 3 is gone: its process has ended; rank 0 waited for it", 3);
  add(0, true, 10, ": lost rank 3");
  add(1, false, 15, " was killed by SIGSEGV");
  add(3, false, 20, " was killed by SIGKILL");
  EXPECT_EQ(cause(), "rank 3 was killed by SIGKILL");
}

TEST_F(FailureLogTest, ACrashWhileARankEndsIsNotTheCause) {
  control_.abort(0, "[comm] rank 3 did not come within 5 s; rank 0 waited for it in gather", 3);
  add(0, true, 10, ": [comm] rank 3 did not come");
  add(1, false, 15, " was killed by SIGSEGV");
  EXPECT_EQ(cause(), "rank 3 did not come within 5 s; rank 0 waited for it in gather");
}

TEST_F(FailureLogTest, WhoEndedWithZeroIsNamedByThoseWhoMissIt) {
  control_.set_progress(3, 7, "backward");
  control_.abort(0,
                 "[comm] rank 3 is gone: its process has ended; rank 0 waited for it in gather "
                 "(rank 3: step 7)\nwhat the other ranks were doing:\n  rank 1: computes",
                 3);
  log_.ended_in_order(3);
  add(0, true, 10, ": [comm] rank 3 is gone");
  EXPECT_EQ(cause(),
            "rank 3 ended with exit code 0 at step 7, phase backward; rank 0 waited for it "
            "in gather");
}

TEST_F(FailureLogTest, TheOthersAreListedAsTheyWereAtTheFirstFailure) {
  control_.set_progress(1, 7, "backward");
  add(2, false, 10, " was killed");
  control_.set_progress(1, 8, "forward");
  add(1, true, 20, ": lost rank 2");
  EXPECT_EQ(log_.others(*log_.cause(control_)),
            "\n  rank 0: computes\n  rank 1: step 7, backward, computes\n  rank 3: computes");
}

TEST_F(FailureLogTest, TheUsersOwnMistakesComeWithoutTheOthers) {
  log_.add(control_, comm::failure_of(control_, 1, {.code = 3, .text = "train.jsonl:7:\n  bad"}));
  EXPECT_EQ(cause(), "rank 1: train.jsonl:7: bad");
  EXPECT_EQ(log_.others(*log_.cause(control_)), "");
}

TEST(UnitNamesTest, LongNamesKeepTheirEndAndStrangersAreNumbers) {
  const auto memory = comm::Mapping::anonymous(ControlView::bytes(1));
  const ControlView control = ControlView::create(memory->data(), 1);
  const std::string prefix(60, 'x');
  const std::vector<std::string> names = {"root", prefix + ".layers.12"};
  EXPECT_EQ(control.unit_name(0), "");
  control.name_units(names);
  control.name_units(names);
  EXPECT_EQ(control.unit_name(0), "root");
  EXPECT_EQ(control.unit_name(1), std::string(37, 'x') + ".layers.12");
  EXPECT_EQ(control.unit_name(2), "");
  EXPECT_EQ(control.unit_name(-1), "");
}

TEST(UnitNamesTest, TwoModelsWithOtherNamesAreKnownByNumbers) {
  const auto memory = comm::Mapping::anonymous(ControlView::bytes(1));
  const ControlView control = ControlView::create(memory->data(), 1);
  control.name_units(std::vector<std::string>{"root", "layers.0"});
  control.name_units(std::vector<std::string>{"root", "critic.0"});
  EXPECT_EQ(control.unit_name(1), "");
}

// Rank 0 waits for rank 1, which waits for rank 2, which does not come: rank 0's time is over
// first.
TEST(TimeOutTest, BlamesTheEndOfTheChainOfWaits) {
  comm::ThreadWorld world(3, {.timeout_s = 0.6});
  std::string text;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 3; ++rank) {
    threads.emplace_back([&, rank] {
      const auto own = world.communicator(rank);
      try {
        if (rank == 2) std::this_thread::sleep_for(std::chrono::milliseconds(1200));
        if (rank == 1) std::this_thread::sleep_for(std::chrono::milliseconds(200));
        const comm::Group first = rank == 0 ? comm::Group{0} : comm::Group{1, 2};
        const comm::Group second = rank == 2 ? comm::Group{2} : comm::Group{0, 1};
        own->finish(own->begin_fence(first, comm::make_tag("first")));
        own->finish(own->begin_fence(second, comm::make_tag("second")));
      } catch (const CommError& e) {
        if (rank == 0) text = e.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_NE(text.find("rank 2 did not come within 0.6 s and keeps rank 1 waiting"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("what the other ranks were doing:\n  rank 1: waits for rank 2 in first ("),
            std::string::npos)
      << text;
}

TEST(FailureReportTest, TheLauncherTellsWhatEveryRankWasDoing) {
  ChildProgram launcher({FSDP_RANK_PROGRAM, "--launch", "4", "lose-in-a-unit"}, {});
  EXPECT_EQ(describe_status(launcher.wait(30)), "exit 8");
  const std::regex expected(
      "finetune: what the other ranks were doing:\n"
      "  rank 0: step 7, backward, waits for rank 1 in gather of unit 'layers.1' \\(0\\.[0-9] "
      "s\\)\n"
      "  rank 2: step 7, backward, computes unit 'layers.2' \\(after barrier 'ready'\\)\n"
      "  rank 3: step 7, backward, waits for rank 1 in gather of unit 'layers.1' \\(0\\.[0-9] "
      "s\\)\n"
      "finetune: rank 1 was killed by SIGKILL at step 7, phase backward, unit 'layers.2', after "
      "barrier 'ready'\n");
  EXPECT_TRUE(std::regex_match(launcher.output(), expected)) << launcher.output();
}

TEST(FailureReportTest, WithoutOurLauncherTheSurvivorsTellIt) {
  auto ranks = start_ranks(4, {FSDP_RANK_PROGRAM, "lose-in-a-unit"}, {});
  EXPECT_EQ(describe_status(ranks[1].wait(20)), "SIGKILL");
  for (const int rank : {0, 2, 3})
    EXPECT_EQ(describe_status(ranks[rank].wait(20)), "exit 8") << ranks[rank].output();
  // Rank 0 or 3 found it, and the other one repeats its words.
  const std::string text = ranks[0].output();
  EXPECT_TRUE(std::regex_search(
      text,
      std::regex("rank 1 is gone: its process has ended; rank [03] waited for it in gather of "
                 "unit 'layers.1' at step 7 \\(4096 bytes\\) \\(rank 1: step 7, phase "
                 "backward, its last collective was barrier 'ready'\\)\n")))
      << text;
  EXPECT_TRUE(std::regex_search(
      text, std::regex("what the other ranks were doing:\n(  rank 0: .*\n)?  rank 2: step 7, "
                       "backward, computes unit 'layers.2' \\(after barrier 'ready'\\)")))
      << text;
}

TEST(FailureReportTest, ARankThatLoopsForEverIsFoundByTheCollectivesLimit) {
  ChildProgram launcher({FSDP_RANK_PROGRAM, "--launch", "3", "spin"},
                        {"FSDP_COMM_TIMEOUT=1", "FSDP_PEER_TIMEOUT=0.5"});
  EXPECT_EQ(describe_status(launcher.wait(20)), "exit 8");
  const std::string text = launcher.output();
  EXPECT_NE(text.find("\nfinetune: rank 1 did not come within 1 s; rank "), std::string::npos)
      << text;
  EXPECT_NE(text.find(" waited for it in barrier 'next' at step 3 (rank 1: step 3, phase forward"),
            std::string::npos)
      << text;
}

TEST(FailureReportTest, ARankThatIsStoppedBeforeItJoinsIsAFailure) {
  ChildProgram launcher({FSDP_RANK_PROGRAM, "--launch", "2", "greet"},
                        {"FSDP_PEER_TIMEOUT=0.5", "FSDP_TEST_STOP_RANK=1"});
  EXPECT_EQ(describe_status(launcher.wait(20)), "exit 8");
  EXPECT_TRUE(launcher.output().ends_with(
      "finetune: rank 1 was stopped by SIGSTOP for 0.5 s before it joined the others\n"))
      << launcher.output();
}

TEST(FailureReportTest, ARankThatNeverJoinsIsAnErrorAfterItsOwnTimeOut) {
  auto ranks =
      start_ranks(2, {FSDP_RANK_PROGRAM, "greet"},
                  {"FSDP_PEER_TIMEOUT=0.3", "FSDP_JOIN_TIMEOUT=1", "FSDP_TEST_STOP_RANK=1"});
  EXPECT_EQ(describe_status(ranks[0].wait(20)), "exit 8");
  EXPECT_NE(ranks[0].output().find("rank 1 did not join within 1 s"), std::string::npos)
      << ranks[0].output();
}

}  // namespace
}  // namespace fsdp
