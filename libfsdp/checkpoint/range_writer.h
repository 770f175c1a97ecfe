// Writes the files of a checkpoint, range by range, and keeps the digest of each range.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/checkpoint/digest.h"
#include "libfsdp/io/file.h"

namespace fsdp::checkpoint {

/// Bytes of a file that were written at once, by one rank.
struct WrittenRange {
  std::string
      file;  ///< Relative to the checkpoint: "model.safetensors", "optimizer/1.safetensors".
  std::string tensor;  ///< Whose bytes they are; empty = a header, or a file that holds no tensors.
  int64_t begin = 0;   ///< First byte within the file.
  int64_t bytes = 0;
  Digest digest;

  bool operator==(const WrittenRange&) const = default;
};

/// Is this a path that stays within its directory: relative, of plain names? (Names come from
/// files.)
bool is_safe_name(std::string_view file);

/// What one rank writes of one checkpoint; used by one thread at a time.
///
/// Together the ranks must write every byte of every file exactly once. A file is made by one rank
/// with create(), or by all that write to it with share(), which needs no barrier. Any error voids
/// the checkpoint: nothing is retried, except interrupted and short writes.
/// Memory: none that grows with the files, but the list of ranges.
/// Throws, all functions: HostResourceError (full disk, broken device: path, offset, cause),
/// ConfigError (file exists, no permission), InternalError for a range outside its file.
class RangeWriter {
 public:
  /// `directory` exists.
  explicit RangeWriter(std::string directory);

  /// Makes a new file of that size; its disk blocks are reserved, so that a full disk shows now.
  void create(const std::string& file, int64_t bytes);
  /// Opens a file that other ranks write to as well, and makes it unless another rank already has;
  /// all give the same size.
  void share(const std::string& file, int64_t bytes);

  /// Writes one range.
  void write(const std::string& file, std::string_view tensor, int64_t at,
             std::span<const std::byte> data);
  /// Writes one range in pieces that follow each other.
  void begin(const std::string& file, std::string_view tensor, int64_t at);
  void append(std::span<const std::byte> data);
  void end();

  /// A small file of its own.
  void write_file(const std::string& file, std::string_view content);
  /// A copy of a file from elsewhere.
  void copy_file(const std::string& from, const std::string& file);

  /// Brings everything to the disk and closes the files. Directories are the committer's business.
  void finish();

  /// Ranges that hold at least one byte, in the order of writing.
  const std::vector<WrittenRange>& written() const { return written_; }
  int64_t written_bytes() const { return written_bytes_; }

  /// Makes every later call throw InternalError. From any thread: ends a save whose result nobody
  /// wants.
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }

 private:
  struct OpenFile {
    io::File file;
    int64_t bytes = 0;
  };
  void add(const std::string& file, io::File opened, int64_t bytes);
  std::string path_for_new(const std::string& file) const;
  const OpenFile& open_file(const std::string& file) const;
  void start_writeback(int64_t end, size_t bytes);
  void check_not_cancelled() const;

  std::string directory_;
  std::map<std::string, OpenFile, std::less<>> files_;
  std::vector<WrittenRange> written_;
  int64_t written_bytes_ = 0;
  Hasher hasher_;
  std::optional<WrittenRange> current_;
  const OpenFile* current_file_ = nullptr;
  int64_t unsent_bytes_ = 0;  // Of this range, at its end.
  std::atomic<bool> cancelled_{false};
};

}  // namespace fsdp::checkpoint
