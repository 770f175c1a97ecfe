// Saves checkpoints so that a directory holds, at every instant and after every failure, the old
// one or the new one, whole.
//
// The ranks write aside, into `<output>/.tmp-checkpoint-<step>-<nonce>`, and sync; they agree that
// all of them succeeded; rank 0 writes the manifest, syncs it and the directories, renames to
// `checkpoint-<step>`, syncs that, writes `latest`, removes older checkpoints; they agree again. So
// what a save has returned survives a power loss, and an error is thrown by all ranks alike.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "libfsdp/checkpoint/checkpoint_files.h"
#include "libfsdp/checkpoint/range_writer.h"
#include "libfsdp/checkpoint/verdict.h"
#include "libfsdp/comm/communicator.h"
#include "libfsdp/io/json.h"

namespace fsdp::checkpoint {

/// One checkpoint to be written; equal on all ranks, but for `write`.
struct SaveRequest {
  int64_t step = 0;
  std::string strategy;  ///< Into the manifest, for people.
  io::Json details;      ///< Into the manifest: options, dtypes, ... Rank 0's is taken.
  /// Writes this rank's files and ranges. Runs in a thread of its own when `in_background`: then it
  /// must not use the communicator, and what it reads must not change until the save has ended.
  std::function<void(RangeWriter&)> write;
  bool in_background = false;
  bool overwrite = false;  ///< Replace a checkpoint of this step; else it is a ConfigError.
  /// Keep so many whole checkpoints, the newest; 0 = all. The new one and the best are never
  /// removed.
  int64_t save_total_limit = 0;
  int64_t best_step = -1;  ///< Step of the best checkpoint; -1 = none.
};

/// The saves of one run into one output directory. Used by one thread at a time, the one that uses
/// the communicator, which must outlive it; all ranks call the same functions in the same order.
///
/// Errors: all ranks throw the same one, which names the rank, unless a rank is gone (CommError).
/// After an error the temporary directory is gone and the older checkpoints are as they were. If
/// only `latest` or the removal of older checkpoints fails, the save has succeeded: a warning.
class CheckpointSave {
 public:
  /// Makes the directory, and removes what dead runs left in it. Collective.
  /// Throws: ConfigError, HostResourceError.
  CheckpointSave(comm::Communicator& comm, std::string output_directory);
  CheckpointSave(const CheckpointSave&) = delete;
  CheckpointSave& operator=(const CheckpointSave&) = delete;
  /// Gives up a save in flight: its `write` ends at the next use of its RangeWriter.
  ~CheckpointSave();

  /// start(), then wait().
  void save(SaveRequest request);

  /// Begins a save; one that is in flight is waited for first. Collective; one exchange. Without
  /// `in_background` it returns when this rank has written its part; errors come from wait().
  void start(SaveRequest request);

  /// Commits the save in flight if all ranks have written it. Collective; cheap when they have not.
  /// Returns whether nothing is in flight any more. Throws what the save failed with.
  bool try_commit();

  /// Waits for the save in flight, if there is one, and commits it. Collective.
  void wait();

  bool in_flight() const { return flight_ != nullptr; }
  /// Path of the newest checkpoint that this object has committed; empty before the first.
  const std::string& last_saved() const { return last_saved_; }
  const std::string& output_directory() const { return output_directory_; }

 private:
  struct Flight;
  void begin(Flight& flight, Outcome& outcome);
  void commit();
  void publish(Flight& flight, std::span<const Outcome> outcomes);
  std::vector<Doomed> tidy_up(const SaveRequest& request) const noexcept;
  void erase(Flight& flight, std::vector<Doomed> doomed);

  comm::Communicator& comm_;
  std::string output_directory_;
  Verdict written_;    // Did every rank write its part?
  Verdict committed_;  // Did rank 0 commit?
  std::unique_ptr<Flight> flight_;
  std::string last_saved_;
  std::thread eraser_;  // Removes the files of old checkpoints behind the training's back.
};

}  // namespace fsdp::checkpoint
