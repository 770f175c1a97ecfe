// SIGKILL of one rank or of all, at random instants of saves: the directory holds the old
// checkpoint or the new one.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <map>
#include <random>
#include <thread>

#include "libfsdp/base/log.h"
#include "libfsdp/checkpoint/checkpoint_files.h"
#include "libfsdp/checkpoint/checkpoint_list.h"
#include "libfsdp/comm/host/shm_world.h"
#include "libfsdp/comm/host/thread_world.h"
#include "tests/support/checkpoint_cases.h"

namespace fsdp {
namespace {

using checkpoint::CheckpointSave;
using testing::long_run;
using testing::ScratchDirectory;

constexpr int64_t kPartBytes = 20'000;
constexpr int64_t kStep = 7;  // Of all contents, where checkpoints are overwritten.

/// How ranks save.
struct Mode {
  std::string name;
  bool overwrite = false;
  int64_t limit = 0;
  bool in_background = false;
};
const std::vector<Mode> kModes = {
    {.name = "new step, limit 2", .limit = 2},
    {.name = "overwrite", .overwrite = true},
    {.name = "new step, limit 1, in background", .limit = 1, .in_background = true},
    {.name = "overwrite in background", .overwrite = true, .in_background = true}};

/// What the ranks tell the test, in memory that all map.
struct Shared {
  std::atomic<int64_t> begun{0};     // Newest content whose save has begun,
  std::atomic<int64_t> returned{0};  // and whose save has returned, on rank 0.
  std::atomic<bool> failed{false};   // By anything but the loss of a rank.
};

void save_for_ever(comm::Communicator& comm, const std::string& directory, const Mode& mode,
                   Shared& shared) {
  CheckpointSave save(comm, directory);
  for (int64_t content = shared.begun + 1;; ++content) {
    comm.barrier(comm::make_tag("begin"));  // Until here nobody changes `begun`.
    auto request = testing::request_of(mode.overwrite ? kStep : content, comm.rank(), comm.size(),
                                       kPartBytes, content);
    request.overwrite = true;  // A dead run may have left one that did not return.
    request.save_total_limit = mode.limit;
    request.in_background = mode.in_background;
    if (comm.rank() == 0) shared.begun = content;
    save.start(std::move(request));
    if (mode.in_background) {
      while (!save.try_commit()) std::this_thread::yield();
    } else {
      save.wait();
    }
    if (comm.rank() == 0) shared.returned = content;
  }
}

/// One rank, in a process of its own; does not return.
[[noreturn]] void run_rank(std::vector<comm::RankParts>& parts, int rank,
                           const std::string& directory, const Mode& mode, Shared& shared) {
  try {
    comm::RankParts own = std::move(parts[static_cast<size_t>(rank)]);
    parts.clear();  // The other ranks' ends: their owners' deaths would not be noticed.
    const auto comm = comm::join_shm(std::move(own));
    save_for_ever(*comm, directory, mode, shared);
  } catch (const CommError&) {
    ::_exit(0);  // A peer is gone.
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
  }
  shared.failed = true;
  ::_exit(1);
}

class KillTest : public ::testing::Test {
 protected:
  KillTest() {
    log::set_level(log::Level::kError);
    void* memory =
        ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared_ = new (memory) Shared();
  }
  ~KillTest() override { ::munmap(shared_, sizeof(Shared)); }

  /// Starts ranks, kills some of them after a random time, and waits for the end of all.
  void start_and_kill(const std::string& directory, const Mode& mode, int ranks, bool all) {
    auto parts = comm::make_shm_world(ranks);
    const int64_t before = shared_->begun;
    std::vector<pid_t> pids;
    for (int rank = 0; rank < ranks; ++rank) {
      const pid_t pid = ::fork();
      if (pid == 0) run_rank(parts, rank, directory, mode, *shared_);
      pids.push_back(pid);
    }
    parts.clear();
    while (shared_->begun == before && !shared_->failed) std::this_thread::yield();
    // Two saves and a half, so that the first one is not the only one that is interrupted.
    const double us = save_us_[&mode];
    std::this_thread::sleep_for(
        std::chrono::microseconds(static_cast<int64_t>(random_() % 1000 / 400.0 * us)));
    if (all) {
      for (const pid_t pid : pids) ::kill(pid, SIGKILL);
    } else {
      ::kill(pids[random_() % pids.size()], SIGKILL);
    }
    for (const pid_t pid : pids) {
      int status = 0;
      ASSERT_EQ(::waitpid(pid, &status, 0), pid);
    }
    ASSERT_FALSE(shared_->failed);
  }

  /// The newest whole checkpoint is the last that returned, or the one that had begun.
  void look(const std::string& directory, const Mode& mode, int ranks) {
    checkpoint::CheckpointList list(directory);
    for (const auto& one : list.skipped()) ADD_FAILURE() << "skipped: " << one.why;
    const auto comm = comm::make_single();
    const auto found = list.newest_whole(*comm);
    const int64_t returned = shared_->returned;
    const int64_t begun = shared_->begun;
    const int64_t content = found ? testing::content_of(found->path, ranks, kPartBytes) : 0;
    ASSERT_TRUE(content == returned || content == begun)
        << "content " << content << ", returned " << returned << ", begun " << begun;
    ++(content == returned ? old_ : new_);
    EXPECT_TRUE(!found || found->step == (mode.overwrite ? kStep : content));
    shared_->returned = content;
  }

  void measure(const std::string& directory, const Mode& mode, int ranks) {
    const auto start = std::chrono::steady_clock::now();
    const auto comm = comm::make_single();
    CheckpointSave save(*comm, directory);
    auto request = testing::request_of(1, 0, 1, kPartBytes * ranks);
    request.in_background = mode.in_background;
    save.save(request);
    save_us_[&mode] =
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
  }

  void kill_many(const std::string& base, int trials) {
    for (int trial = 0; trial < trials && !HasFatalFailure(); ++trial) {
      const Mode& mode = kModes[static_cast<size_t>(trial) % kModes.size()];
      const int ranks = 2 + static_cast<int>(random_() % 3);
      const bool all = random_() % 2 == 0;
      const ScratchDirectory scratch(base);
      if (!save_us_.contains(&mode)) measure(scratch / "measure", mode, ranks);
      shared_->begun = shared_->returned = 0;
      // Each run goes on from what the last one left.
      for (int run = 0; run < 2 && !HasFatalFailure(); ++run, ++kills_) {
        start_and_kill(scratch / "out", mode, ranks, all);
        if (HasFatalFailure()) return;
        look(scratch / "out", mode, ranks);
      }
      const auto comm = comm::make_single();
      const CheckpointSave next(*comm, scratch / "out");
      EXPECT_TRUE(testing::strays(scratch / "out").empty()) << testing::strays(scratch / "out")[0];
    }
    std::printf("%s: %d kills, %d old, %d new\n", base.c_str(), kills_, old_, new_);
  }

  Shared* shared_ = nullptr;
  std::mt19937_64 random_{std::random_device{}()};
  std::map<const Mode*, double> save_us_;
  int kills_ = 0;
  int old_ = 0;
  int new_ = 0;
};

TEST_F(KillTest, InMemory) { kill_many("/dev/shm", long_run() ? 2000 : 80); }
TEST_F(KillTest, OnDisk) { kill_many("/tmp", long_run() ? 500 : 20); }

}  // namespace
}  // namespace fsdp
