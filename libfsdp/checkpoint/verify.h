// Reads a checkpoint back, to the last byte, and says what is damaged.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "libfsdp/checkpoint/manifest.h"

namespace fsdp::checkpoint {

/// Part `index` of `count` of the bytes; all parts together are the whole.
struct VerifyShare {
  int64_t index = 0;
  int64_t count = 1;
};

struct Damage {
  std::string file;    ///< Its path.
  std::string tensor;  ///< Empty: a header, a small file, or a whole file.
  std::string what;
  /// "[checkpoint] DIR/model.safetensors, tensor 'a.weight': its digest differs: ..."
  std::string text() const;
};

struct VerifyReport {
  std::string directory;
  int64_t step = -1;  ///< -1: the manifest cannot be read.
  int64_t world_size = 0;
  std::string time;
  std::string strategy;
  int64_t files = 0;       ///< Without the manifest and the lists.
  int64_t bytes = 0;       ///< Of those files.
  int64_t read_bytes = 0;  ///< Of this share.
  int64_t digests = 0;     ///< Checked in this share.
  double seconds = 0;
  std::vector<Damage> damages;
  std::vector<std::string> extra;  ///< Harmless files that the manifest does not know.

  bool whole() const { return damages.empty(); }
};

/// Compares a checkpoint with its manifest: every file there, in its size, every byte of it in just
/// one range, every range with its digest; and no weights beside them that a reader could take.
///
/// The structure is checked whatever the share. Memory: the lists, and one buffer of 4 MiB. Damage
/// is reported, not thrown; so is a directory that is no checkpoint.
VerifyReport verify(const std::string& checkpoint, VerifyShare share = {});

/// The same by several threads of this process.
VerifyReport verify_by_threads(const std::string& checkpoint, int threads);

}  // namespace fsdp::checkpoint
