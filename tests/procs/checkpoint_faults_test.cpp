// A save in which one call of one rank fails: the n-th open, write, fsync, rename, ... or operator
// new, for every n until the save succeeds. All ranks throw the same error, the previous checkpoint
// is whole, nothing temporary is left.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>

#include "libfsdp/base/log.h"
#include "libfsdp/checkpoint/checkpoint_files.h"
#include "libfsdp/checkpoint/checkpoint_list.h"
#include "libfsdp/checkpoint/verify.h"
#include "tests/support/checkpoint_cases.h"
#include "tests/support/rank_threads.h"
#include "tests/support/system_calls.h"

namespace fsdp {
namespace {

namespace fs = std::filesystem;
using checkpoint::CheckpointSave;
using checkpoint::SaveRequest;
using comm::Communicator;
using testing::CallKind;
using testing::Fault;
using testing::FaultScope;
using testing::long_run;
using testing::ScratchDirectory;

constexpr int kRanks = 2;
constexpr int64_t kPartBytes = 600;

/// A save of content 2 after one of content 1.
struct Scenario {
  std::string name;
  int64_t step = 2;
  bool overwrite = false;
  int64_t limit = 0;
  bool in_background = false;
};

const std::vector<Scenario> kScenarios = {
    {.name = "new step"},
    {.name = "overwrite", .step = 1, .overwrite = true},
    {.name = "limit 1", .limit = 1},
    {.name = "in background", .in_background = true},
};

struct Trial {
  bool fault_happened = false;
  std::vector<std::string> errors{kRanks};
};

SaveRequest request(const Scenario& scenario, int64_t content, int rank) {
  SaveRequest made = testing::request_of(scenario.step, rank, kRanks, kPartBytes, content);
  made.overwrite = scenario.overwrite;
  made.save_total_limit = scenario.limit;
  made.in_background = scenario.in_background;
  return made;
}

Trial run_trial(const std::string& directory, const Scenario& scenario, int faulty_rank,
                const Fault& fault) {
  Trial trial;
  testing::run_ranks(kRanks, [&](Communicator& comm) {
    std::string output = directory;
    SaveRequest made = request(scenario, 2, comm.rank());
    const auto faults = std::make_shared<void*>(nullptr);
    made.write = [write = made.write, faults](checkpoint::RangeWriter& writer) {
      FaultScope::inherit(*faults);  // The thread may be another one.
      write(writer);
    };
    std::optional<FaultScope> scope;
    if (comm.rank() == faulty_rank) scope.emplace(fault, directory);
    *faults = FaultScope::current();
    try {
      CheckpointSave save(comm, std::move(output));
      save.save(std::move(made));
    } catch (const std::exception& error) {
      trial.errors[static_cast<size_t>(comm.rank())] = error.what();
    }
    if (scope) trial.fault_happened = scope->happened();
  });
  return trial;
}

/// The directory that every trial begins with: one checkpoint of content 1.
void prepare(const std::string& directory) {
  fs::remove_all(directory);
  testing::run_ranks(kRanks, [&](Communicator& comm) {
    CheckpointSave save(comm, directory);
    save.save(request({.step = 1}, 1, comm.rank()));
  });
}

int64_t content_at(const std::string& directory, int64_t step) {
  const std::string path = directory + "/" + checkpoint::checkpoint_name(step);
  if (!fs::exists(path)) return 0;
  const auto report = checkpoint::verify(path);
  EXPECT_TRUE(report.whole()) << report.damages.front().text();
  return report.whole() ? testing::content_of(path, kRanks, kPartBytes) : -1;
}

/// What is wrong after a trial, "" = nothing.
std::string flaw(const std::string& directory, const Scenario& scenario, int rank,
                 const Fault& fault, const Trial& trial) {
  const bool failed = !trial.errors[0].empty();
  const bool no_memory = fault.kind == CallKind::kNew;
  for (const std::string& error : trial.errors) {
    // Without any memory, that rank itself cannot make the text.
    if (error != trial.errors[0] && !(no_memory && fault.persistent)) return "errors differ";
    if (error.empty() == failed) return "not all ranks failed";
  }
  if (failed && !(no_memory && fault.persistent)) {
    const std::string cause = no_memory ? "out of host memory" : std::strerror(fault.code);
    if (trial.errors[0].find(cause) == std::string::npos) return "the cause is not named";
    if (trial.errors[0].find(cat("rank ", rank, ": ")) == std::string::npos)
      return "the rank is not named";
  }
  const int64_t now = content_at(directory, scenario.step);
  const int64_t before = scenario.step == 1 ? now : content_at(directory, 1);
  const auto strays = testing::strays(directory);
  if (failed) {
    if (scenario.step == 1 ? now != 1 : (now != 0 || before != 1)) return "the old one is not left";
    if (!strays.empty()) return cat("left: ", strays[0]);
  } else {
    if (now != 2) return "saved, but not there";
    if (scenario.limit == 0 && scenario.step != 1 && before != 1) return "the old one is gone";
    // What could not be removed is for the next run.
    if (!strays.empty() && fault.kind != CallKind::kUnlink && fault.kind != CallKind::kOpen)
      return cat("saved, but left: ", strays[0]);
    checkpoint::remove_leftovers(directory);
    if (!testing::strays(directory).empty()) return "the next run cannot tidy up";
  }
  return {};
}

struct Count {
  int64_t trials = 0;
  int64_t failed = 0;
};

/// All n of one kind of fault. Transient EINTR and short calls must not fail at all.
void try_all(const std::string& directory, const Scenario& scenario, int rank, Fault fault,
             Count& count) {
  const bool harmless = fault.code == 0;
  for (fault.nth = 0; fault.nth < 5000; ++fault.nth) {
    prepare(directory);
    const Trial trial = run_trial(directory, scenario, rank, fault);
    if (!trial.fault_happened) return;
    ++count.trials;
    count.failed += trial.errors[0].empty() ? 0 : 1;
    const std::string wrong = flaw(directory, scenario, rank, fault, trial);
    ASSERT_EQ(wrong, "") << scenario.name << ", rank " << rank << ", " << name_of(fault.kind)
                         << " number " << fault.nth << " gives " << fault.code
                         << (fault.persistent ? " from then on" : "") << ": " << trial.errors[0]
                         << " | " << trial.errors[1];
    if (harmless) {
      ASSERT_EQ(trial.errors[0], "") << name_of(fault.kind) << fault.nth;
    }
  }
  FAIL() << "no end";
}

void try_kind(CallKind kind, const std::vector<int>& codes) {
  log::set_level(log::Level::kError);
  const ScratchDirectory scratch("/dev/shm");
  Count count;
  for (const Scenario& scenario : kScenarios) {
    for (int rank = 0; rank < kRanks; ++rank) {
      for (const int code : codes) {
        for (const bool persistent : {false, true}) {
          // A disk that is gone for good: tidying up cannot work either; the next run does it.
          if (persistent && (kind == CallKind::kUnlink || kind == CallKind::kOpen)) continue;
          if (persistent && (code == EINTR || code == 0)) continue;
          if (persistent && !long_run() && scenario.name != "overwrite") continue;
          try_all(scratch / "out", scenario, rank, {kind, 0, code, persistent}, count);
          if (::testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
  std::printf("%s: %ld trials, %ld ended in an error\n", std::string(name_of(kind)).c_str(),
              static_cast<long>(count.trials), static_cast<long>(count.failed));
}

TEST(CheckpointFaultsTest, AnyOpenMayFail) { try_kind(CallKind::kOpen, {ENOSPC, EIO, EINTR}); }
TEST(CheckpointFaultsTest, AnyMkdirMayFail) { try_kind(CallKind::kMkdir, {ENOSPC, EIO}); }
TEST(CheckpointFaultsTest, AnyWriteMayFail) {
  try_kind(CallKind::kWrite, {ENOSPC, EIO, EINTR, EDQUOT, 0});
}
TEST(CheckpointFaultsTest, AnyReadMayFail) { try_kind(CallKind::kRead, {EIO, EINTR, 0}); }
TEST(CheckpointFaultsTest, AnyAllocationOfBlocksMayFail) {
  try_kind(CallKind::kAllocate, {ENOSPC, EIO, EINTR});
}
TEST(CheckpointFaultsTest, AnySyncMayFail) { try_kind(CallKind::kSync, {ENOSPC, EIO, EINTR}); }
TEST(CheckpointFaultsTest, AnyRenameMayFail) {
  try_kind(CallKind::kRename, {ENOSPC, EIO, EINVAL, EACCES});
}
TEST(CheckpointFaultsTest, AnyUnlinkMayFail) { try_kind(CallKind::kUnlink, {EIO, EACCES}); }
TEST(CheckpointFaultsTest, AnyAllocationOfMemoryMayFail) { try_kind(CallKind::kNew, {ENOMEM}); }

/// What newest_whole() gives on every rank when one call of rank 1 fails: a step, or an error.
std::vector<std::string> find_newest(const std::string& directory, const Fault& fault,
                                     bool& happened) {
  std::vector<std::string> results(kRanks);
  testing::run_ranks(kRanks, [&](Communicator& comm) {
    checkpoint::CheckpointList list(directory);
    std::string text;
    text.reserve(1000);
    std::optional<FaultScope> scope;
    if (comm.rank() == 1) scope.emplace(fault, directory);
    try {
      const auto found = list.newest_whole(comm);
      if (scope) happened = scope->happened();
      scope.reset();
      text = cat("step ", found ? found->step : -1);
      for (const auto& one : list.skipped()) text += " skipped: " + one.why;
    } catch (const std::exception& error) {
      if (scope) happened = scope->happened();
      text = error.what();
    }
    results[static_cast<size_t>(comm.rank())] = text;
  });
  return results;
}

TEST(CheckpointFaultsTest, WhatIsFoundIsTheSameOnAllRanksWhateverFails) {
  const ScratchDirectory scratch("/dev/shm");
  testing::run_ranks(kRanks, [&](Communicator& comm) {
    CheckpointSave save(comm, scratch.path());
    for (const int64_t step : {1, 2})
      save.save(testing::request_of(step, comm.rank(), kRanks, kPartBytes));
  });
  for (const Fault& kind : {Fault{CallKind::kOpen, 0, EIO},
                            {CallKind::kRead, 0, EIO},
                            {CallKind::kRead, 0, EINTR},
                            {CallKind::kRead, 0, 0},
                            {CallKind::kNew, 0, ENOMEM}}) {
    Fault fault = kind;
    bool happened = true;
    for (; happened; ++fault.nth) {
      ASSERT_LT(fault.nth, 5000);
      happened = false;
      const auto results = find_newest(scratch.path(), fault, happened);
      ASSERT_EQ(results[0], results[1]) << name_of(fault.kind) << fault.nth;
      if (results[0] == "step 2") continue;
      ASSERT_TRUE(happened);
      ASSERT_NE(fault.code, EINTR);
      ASSERT_NE(fault.code, 0);
      const bool no_memory = fault.kind == CallKind::kNew;
      EXPECT_TRUE(results[0].starts_with(no_memory ? "rank 1: " : "step 1 skipped: "));
      EXPECT_THAT(results[0],
                  ::testing::HasSubstr(no_memory ? "out of host memory" : "Input/output error"));
    }
    EXPECT_GT(fault.nth, 3) << name_of(fault.kind);
  }
}

/// Runs in a process of its own, in which a tmpfs of 1 MiB is mounted; what is wrong, "" = nothing.
std::string fill_small_disk(const std::string& directory) {
  int64_t saved = 0;
  std::vector<std::string> errors(kRanks);
  testing::run_ranks(kRanks, [&](Communicator& comm) {
    try {
      CheckpointSave save(comm, directory);
      for (int64_t step = 1; step <= 100; ++step) {
        save.save(testing::request_of(step, comm.rank(), kRanks, 40'000));
        if (comm.rank() == 0) saved = step;
      }
    } catch (const HostResourceError& error) {
      errors[static_cast<size_t>(comm.rank())] = error.what();
    }
  });
  if (saved < 2 || saved > 6) return cat(saved, " saves of 240 kB fitted into 1 MiB");
  if (errors[0] != errors[1]) return cat("errors differ: ", errors[0], " | ", errors[1]);
  if (errors[0].find("No space left on device") == std::string::npos) return errors[0];
  const checkpoint::CheckpointList list(directory);
  if (static_cast<int64_t>(list.entries().size()) != saved) return "an older one is gone";
  for (const auto& entry : list.entries()) {
    if (!checkpoint::verify(entry.path).whole()) return cat(entry.path, " is not whole");
  }
  const auto strays = testing::strays(directory);
  return strays.empty() ? "" : cat("left: ", strays[0]);
}

TEST(CheckpointFaultsTest, AFullDiskIsAnErrorOfAllRanks) {
  const ScratchDirectory scratch("/tmp");
  constexpr int kCannotMount = 77;
  const pid_t child = ::fork();
  if (child == 0) {
    const bool mounted = ::unshare(CLONE_NEWNS) == 0 &&
                         ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
                         ::mount("none", scratch.path().c_str(), "tmpfs", 0, "size=1m") == 0;
    if (!mounted) ::_exit(kCannotMount);
    const std::string wrong = fill_small_disk(scratch.path());
    if (!wrong.empty()) std::fprintf(stderr, "%s\n", wrong.c_str());
    ::_exit(wrong.empty() ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  if (WIFEXITED(status) && WEXITSTATUS(status) == kCannotMount)
    GTEST_SKIP() << "this user may not mount a tmpfs";
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace fsdp
