// The commit protocol with ranks as threads.
#include "libfsdp/checkpoint/checkpoint_save.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#include "libfsdp/checkpoint/checkpoint_files.h"
#include "libfsdp/checkpoint/checkpoint_list.h"
#include "libfsdp/checkpoint/verify.h"
#include "tests/support/checkpoint_cases.h"
#include "tests/support/rank_threads.h"

namespace fsdp {
namespace {

namespace fs = std::filesystem;
using checkpoint::CheckpointList;
using checkpoint::CheckpointSave;
using checkpoint::RangeWriter;
using checkpoint::SaveRequest;
using comm::Communicator;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::request_of;
using testing::run_ranks;
using testing::ScratchDirectory;
using testing::strays;

std::vector<int64_t> steps_in(const std::string& directory) {
  std::vector<int64_t> steps;
  const CheckpointList list(directory);
  for (const auto& entry : list.entries()) steps.push_back(entry.step);
  return steps;
}

void save_step(CheckpointSave& save, Communicator& comm, int64_t step, int64_t limit = 0,
               int64_t best = -1) {
  SaveRequest request = request_of(step, comm.rank(), comm.size());
  request.save_total_limit = limit;
  request.best_step = best;
  save.save(std::move(request));
}

/// The error that each rank got, "" = none.
std::vector<std::string> errors_of(int world, const std::function<void(Communicator&)>& fn) {
  std::vector<std::string> errors(static_cast<size_t>(world));
  run_ranks(world, [&](Communicator& comm) {
    try {
      fn(comm);
    } catch (const Error& error) {
      errors[static_cast<size_t>(comm.rank())] = error.what();
    }
  });
  return errors;
}

TEST(CheckpointSaveTest, WhatIsSavedIsWholeAtAnyNumberOfRanks) {
  for (const int world : {1, 2, 3, 4}) {
    const ScratchDirectory scratch;
    run_ranks(world, [&](Communicator& comm) {
      CheckpointSave save(comm, scratch / "deep/out");
      save_step(save, comm, 5);
      save_step(save, comm, 10);
      EXPECT_EQ(save.last_saved(), scratch / "deep/out/checkpoint-10");
    });
    const auto report = checkpoint::verify(scratch / "deep/out/checkpoint-10/");
    EXPECT_TRUE(report.whole()) << report.damages.front().text();
    EXPECT_EQ(report.step, 10);
    EXPECT_EQ(report.world_size, world);
    EXPECT_EQ(report.files, world + 2);
    EXPECT_EQ(report.digests, 3 * world + 2);
    EXPECT_EQ(report.read_bytes, report.bytes);
    EXPECT_THAT(report.extra, IsEmpty());
    EXPECT_THAT(steps_in(scratch / "deep/out"), ElementsAre(5, 10));
    EXPECT_EQ(checkpoint::read_latest(scratch / "deep/out"), "checkpoint-10");
    EXPECT_THAT(strays(scratch / "deep/out"), IsEmpty());
  }
}

TEST(CheckpointSaveTest, AnExistingCheckpointIsReplacedOnlyIfAsked) {
  const ScratchDirectory scratch;
  run_ranks(2, [&](Communicator& comm) {
    CheckpointSave save(comm, scratch.path());
    save_step(save, comm, 5);
    SaveRequest other = request_of(5, comm.rank(), comm.size(), 2000);
    try {
      save.save(other);
      ADD_FAILURE() << "replaced without being asked";
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), HasSubstr("checkpoint-5 exists already"));
    }
    other.overwrite = true;
    save.save(other);
  });
  const auto report = checkpoint::verify(scratch / "checkpoint-5");
  EXPECT_TRUE(report.whole());
  EXPECT_EQ(report.bytes, 16 + 2 * 2 * 2000 + 2 * 2000 + 12);
  EXPECT_THAT(strays(scratch.path()), IsEmpty());
}

TEST(CheckpointSaveTest, ARanksErrorIsThrownByAllAndLeavesTheOldOnes) {
  for (const bool in_background : {false, true}) {
    const ScratchDirectory scratch;
    const auto errors = errors_of(3, [&](Communicator& comm) {
      CheckpointSave save(comm, scratch.path());
      save_step(save, comm, 5);
      SaveRequest request = request_of(6, comm.rank(), comm.size());
      request.in_background = in_background;
      if (comm.rank() == 2) {
        request.write = [](RangeWriter& writer) {
          writer.write_file("half", "x");
          throw HostResourceError("half: write at offset 3: No space left on device");
        };
      }
      save.start(request);
      while (!save.try_commit()) std::this_thread::yield();
    });
    for (const std::string& error : errors)
      EXPECT_EQ(error, "rank 2: half: write at offset 3: No space left on device");
    EXPECT_THAT(steps_in(scratch.path()), ElementsAre(5));
    EXPECT_THAT(strays(scratch.path()), IsEmpty());
    EXPECT_FALSE(fs::exists(scratch / "checkpoint-6"));
  }
}

TEST(CheckpointSaveTest, AMissingPieceIsAnErrorOfTheSave) {
  const ScratchDirectory scratch;
  const auto errors = errors_of(2, [&](Communicator& comm) {
    CheckpointSave save(comm, scratch.path());
    SaveRequest request;
    request.step = 1;
    request.write = [&](RangeWriter& writer) { writer.share("x", 10); };
    save.save(request);
  });
  EXPECT_THAT(errors, ::testing::Each(HasSubstr("wrote 0 bytes of files that have 10")));
  EXPECT_THAT(strays(scratch.path()), IsEmpty());
}

TEST(CheckpointSaveTest, RanksThatSaveDifferentStepsSaveNothing) {
  const ScratchDirectory scratch;
  const auto errors = errors_of(2, [&](Communicator& comm) {
    CheckpointSave save(comm, scratch.path());
    save_step(save, comm, comm.rank());
  });
  EXPECT_THAT(errors, ::testing::Each(HasSubstr("different steps")));
  EXPECT_THAT(steps_in(scratch.path()), IsEmpty());
  EXPECT_THAT(strays(scratch.path()), IsEmpty());
}

TEST(CheckpointSaveTest, OldOnesGoButTheBestAndWhatIsNotWholeStay) {
  const ScratchDirectory scratch;
  fs::create_directories(scratch / "checkpoint-0");  // Of another program.
  run_ranks(2, [&](Communicator& comm) {
    CheckpointSave save(comm, scratch.path());
    for (int64_t step = 1; step <= 6; ++step) {
      save_step(save, comm, step, 2, step < 2 ? -1 : 2);
      if (comm.rank() == 0) {
        const std::vector<std::vector<int64_t>> expected = {{1},    {1, 2}, {2, 3},
                                                            {2, 4}, {2, 5}, {2, 6}};
        EXPECT_EQ(steps_in(scratch.path()), expected[static_cast<size_t>(step - 1)]);
      }
      comm.barrier(comm::make_tag("looked"));
    }
  });
  EXPECT_TRUE(fs::exists(scratch / "checkpoint-0"));
  EXPECT_THAT(strays(scratch.path()), IsEmpty());
}

TEST(CheckpointSaveTest, ABackgroundSaveIsCommittedAtTheFirstCallAfterAllHaveWritten) {
  const ScratchDirectory scratch;
  std::atomic<bool> may_write{false};
  run_ranks(2, [&](Communicator& comm) {
    CheckpointSave save(comm, scratch.path());
    SaveRequest request = request_of(7, comm.rank(), comm.size());
    request.in_background = true;
    const auto write = request.write;
    request.write = [&, write, rank = comm.rank()](RangeWriter& writer) {
      while (rank == 1 && !may_write) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      write(writer);
    };
    save.start(request);
    for (int i = 0; i < 3; ++i) EXPECT_FALSE(save.try_commit());
    EXPECT_TRUE(save.in_flight());
    EXPECT_THAT(steps_in(scratch.path()), IsEmpty());
    comm.barrier(comm::make_tag("looked"));
    may_write = true;
    while (!save.try_commit()) std::this_thread::yield();
    EXPECT_FALSE(save.in_flight());
    EXPECT_THAT(steps_in(scratch.path()), ElementsAre(7));
    // The next one waits for that in flight.
    request.step = 8;
    save.start(request);
    save_step(save, comm, 9);
    EXPECT_THAT(steps_in(scratch.path()), ElementsAre(7, 8, 9));
  });
}

TEST(CheckpointSaveTest, AGivenUpSaveLeavesNothing) {
  const ScratchDirectory scratch;
  std::atomic<int> writing{0};
  run_ranks(2, [&](Communicator& comm) {
    {
      CheckpointSave save(comm, scratch.path());
      SaveRequest request;
      request.in_background = true;
      request.write = [&](RangeWriter& writer) {
        writer.share("x", 1 << 20);
        writer.begin("x", "", 0);
        ++writing;
        const std::vector<std::byte> byte(1);
        for (;;) {  // Until it is cancelled.
          writer.append(std::span(byte).first(0));
          std::this_thread::yield();
        }
      };
      save.start(request);
      while (writing < 2) std::this_thread::yield();
    }
    comm.barrier(comm::make_tag("gone"));
    EXPECT_THAT(strays(scratch.path()), IsEmpty());
  });
  EXPECT_THAT(steps_in(scratch.path()), IsEmpty());
}

TEST(CheckpointSaveTest, LeftoversOfDeadRunsGoAndThoseOfLiveOnesStay) {
  const ScratchDirectory scratch;
  fs::create_directories(scratch / ".tmp-checkpoint-3-dead/optimizer");
  fs::create_directories(scratch / ".tmp-removed-checkpoint-1-dead");
  io::write_text_atomic(scratch / ".tmp-latest-dead", "x");
  fs::create_directories(scratch / ".tmp-somebody-else");
  const checkpoint::TemporaryCheckpoint alive(scratch.path(), 4);
  run_ranks(2, [&](Communicator& comm) { CheckpointSave save(comm, scratch.path()); });
  auto left = strays(scratch.path());
  std::sort(left.begin(), left.end());
  EXPECT_THAT(left, ElementsAre(alive.name(), ".tmp-somebody-else"));
}

TEST(CheckpointSaveTest, AnOldCheckpointBetweenItsNamesIsFoundAndRestored) {
  const ScratchDirectory scratch;
  const auto run = [&](Communicator& comm) {
    CheckpointSave save(comm, scratch.path());
    save_step(save, comm, 5);
  };
  run_ranks(1, run);
  fs::rename(scratch / "checkpoint-5", scratch / ".old-checkpoint-5-0123");
  EXPECT_THAT(steps_in(scratch.path()), ElementsAre(5));
  run_ranks(1, [&](Communicator& comm) { CheckpointSave save(comm, scratch.path()); });
  EXPECT_TRUE(checkpoint::verify(scratch / "checkpoint-5").whole());
  fs::create_directories(scratch / ".old-checkpoint-5-0123");
  EXPECT_THAT(steps_in(scratch.path()), ElementsAre(5));
  run_ranks(1, [&](Communicator& comm) { CheckpointSave save(comm, scratch.path()); });
  EXPECT_THAT(strays(scratch.path()), IsEmpty());
}

TEST(CheckpointListTest, TheNewestWholeOneIsTakenAndTheOthersAreExplained) {
  const ScratchDirectory scratch;
  run_ranks(2, [&](Communicator& comm) {
    CheckpointSave save(comm, scratch.path());
    for (const int64_t step : {1, 2, 3, 4}) save_step(save, comm, step);
    comm.barrier(comm::make_tag("saved"));
    if (comm.rank() == 0) {
      fs::remove(scratch / "checkpoint-4/manifest.json");
      const io::File file = io::File::open_write(scratch / "checkpoint-3/model.safetensors");
      const std::vector<std::byte> other(1, std::byte{0xa5});
      file.write_at(16 + 1500, other);
    }
    comm.barrier(comm::make_tag("damaged"));
    CheckpointList list(scratch.path());
    const auto found = list.newest_whole(comm);
    ASSERT_TRUE(found.has_value());
    EXPECT_EQ(found->step, 2);
    ASSERT_EQ(list.skipped().size(), 2U);
    EXPECT_THAT(list.skipped()[0].why, HasSubstr("checkpoint-4/manifest.json"));
    EXPECT_THAT(list.skipped()[1].why, HasSubstr("model.safetensors, tensor 'a.weight'"));
  });
  const CheckpointList none(scratch / "nowhere");
  EXPECT_THAT(none.entries(), IsEmpty());
}

}  // namespace
}  // namespace fsdp
