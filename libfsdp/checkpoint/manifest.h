// What makes a directory a checkpoint: the list of its files, and of every byte in them a digest.
//
// Each rank writes the list of its own ranges, manifest-00001-of-00004.json; rank 0 writes
// manifest.json last, with the digests of those lists and one of itself. All of it is hostile when
// it is read: names stay within the directory, numbers are bounded, sizes agree.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/checkpoint/digest.h"
#include "libfsdp/checkpoint/range_writer.h"
#include "libfsdp/io/json.h"

namespace fsdp::checkpoint {

inline constexpr int64_t kManifestVersion = 1;
inline constexpr int64_t kMaxWorldSize = 1 << 16;

struct FileBytes {
  std::string file;
  int64_t bytes = 0;
  bool operator==(const FileBytes&) const = default;
};

/// A rank's list of ranges, as a file.
struct RangeList {
  std::string file;
  int64_t bytes = 0;
  Digest digest;
  bool operator==(const RangeList&) const = default;
};

struct Manifest {
  int64_t step = 0;
  int64_t world_size = 1;
  std::string time;              ///< "2026-02-28T12:34:56Z", when it was written.
  std::string strategy;          ///< For people.
  std::vector<FileBytes> files;  ///< All but the lists and the manifest itself, sorted by name.
  std::vector<RangeList> lists;  ///< By rank.
  io::Json details;              ///< What the program adds: options, dtypes.

  int64_t file_bytes() const;
};

/// "manifest-00001-of-00004.json" of rank 0.
std::string list_file_name(int64_t rank, int64_t world_size);

/// The document, with its own digest at the end. parse_manifest reads it back, and no text that
/// differs from it in any bit. Throws (parse): ModelError naming `path`.
std::string manifest_text(const Manifest& manifest);
Manifest parse_manifest(std::string_view text, const std::string& path);

std::string list_text(std::span<const WrittenRange> ranges);
std::vector<WrittenRange> parse_list(std::string_view text, const std::string& path);

/// Writes and syncs a rank's list. Throws: HostResourceError.
RangeList write_list(const std::string& checkpoint, int64_t rank, int64_t world_size,
                     std::span<const WrittenRange> ranges);
/// Writes and syncs manifest.json. Throws: HostResourceError.
void write_manifest(const std::string& checkpoint, const Manifest& manifest);

/// Throws: ModelError, if the manifest is missing or differs from what was written.
Manifest read_manifest(const std::string& checkpoint);
/// The list of one rank. Throws: ModelError naming the list's file.
std::vector<WrittenRange> read_list(const std::string& checkpoint, const RangeList& list);

/// Files below `checkpoint` and their sizes, sorted by name, but not the manifest and the lists;
/// `directories` gets all directories, the checkpoint's own last. Throws: HostResourceError.
std::vector<FileBytes> files_below(const std::string& checkpoint,
                                   std::vector<std::string>* directories = nullptr);

}  // namespace fsdp::checkpoint
