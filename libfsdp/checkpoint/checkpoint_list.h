// The checkpoints in a directory: which there are, which of them are whole.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "libfsdp/checkpoint/checkpoint_files.h"
#include "libfsdp/checkpoint/manifest.h"
#include "libfsdp/comm/communicator.h"

namespace fsdp::checkpoint {

struct CheckpointEntry {
  int64_t step = 0;
  std::string path;
};

/// A directory with the name of a checkpoint that is not used.
struct SkippedCheckpoint {
  std::string path;
  std::string why;  ///< Names the file, and the tensor where one is damaged.
};

/// What is in an output directory, as its names say; the manifests decide, `latest` is a hint only.
class CheckpointList {
 public:
  /// Reads the directory and the manifests, and compares the files' sizes; not one byte of tensors.
  /// A directory that is not there holds no checkpoints. Not collective. Throws: HostResourceError.
  explicit CheckpointList(std::string output_directory);

  /// Committed checkpoints, ascending by step.
  const std::vector<CheckpointEntry>& entries() const& { return entries_; }
  /// What was skipped so far, and why.
  const std::vector<SkippedCheckpoint>& skipped() const& { return skipped_; }
  // `for (... : CheckpointList(...).entries())` would walk over freed memory.
  const std::vector<CheckpointEntry>& entries() && = delete;
  const std::vector<SkippedCheckpoint>& skipped() && = delete;

  /// The newest checkpoint that is whole to the last byte; none if there is no such.
  ///
  /// Collective: each rank reads its share of the bytes; rank 0's list of names is taken. Damaged
  /// ones join skipped() on every rank. Cost: reads one checkpoint once, more if it is damaged.
  /// Throws: HostResourceError, on all ranks alike, if a rank has no memory to look.
  std::optional<CheckpointEntry> newest_whole(comm::Communicator& comm);

 private:
  void consider(const std::string& name, int64_t step);
  void share_list(comm::Communicator& comm);

  std::string output_directory_;
  std::vector<CheckpointEntry> entries_;
  std::vector<SkippedCheckpoint> skipped_;
};

/// The manifest of a checkpoint whose files and lists are all there in their sizes.
/// Throws: ModelError that names the file.
Manifest read_checked_manifest(const std::string& checkpoint);

/// Removes whole checkpoints, oldest first, until `limit` are left; never those of `new_step` and
/// `best_step`. What is not whole is neither counted nor touched. They have lost their names when
/// it returns, and their files go with the result. Throws: HostResourceError.
std::vector<Doomed> remove_older_checkpoints(const std::string& output_directory, int64_t new_step,
                                             int64_t best_step, int64_t limit);

}  // namespace fsdp::checkpoint
