// Files of a model's directory that appear together.
#pragma once

#include <string>
#include <vector>

#include "libfsdp/checkpoint/checkpoint_files.h"

namespace fsdp::checkpoint {

/// Files of a directory that are being made: written in a directory within it,
/// `.tmp-model-<nonce>`, and moved up at the end. Removed with the object if that did not happen;
/// after a process that died remove_leftovers() does it.
class StagedDirectory {
 public:
  /// `directory` exists. Throws: ConfigError, HostResourceError.
  explicit StagedDirectory(std::string directory);
  StagedDirectory(const StagedDirectory&) = delete;
  StagedDirectory& operator=(const StagedDirectory&) = delete;
  ~StagedDirectory();

  const std::string& name() const { return name_; }
  /// Where to write.
  const std::string& path() const { return path_; }

  /// Moves the files up, those last that readers look for first, and, if weights are among them,
  /// removes those of an older save. A reader at any instant sees the old model, the new one, or
  /// (when files of an older index are being replaced) no index at all, never a mix. The files
  /// themselves have been synced. Throws: HostResourceError.
  void publish();

 private:
  void remove_old_weights(const std::vector<std::string>& names) const;

  std::string directory_;
  std::string name_;
  std::string path_;
  Claim claim_;
};

}  // namespace fsdp::checkpoint
