// Files by descriptor: whole reads and writes at an offset, and files that appear complete or not
// at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace fsdp::io {

/// An open file; closes itself. Move-only. Offsets are absolute, so threads and processes may share
/// one file.
class File {
 public:
  /// Opens a regular file (symbolic links are followed) for reading.
  /// Throws: ModelError when it is missing, unreadable, a directory or a device.
  static File open_read(const std::string& path);

  /// Makes a file that must not exist yet; open_write opens one that must exist. Both for reading
  /// and writing. Throws: HostResourceError for a full disk or a broken device, ConfigError for any
  /// other cause.
  static File create(const std::string& path);
  static File open_write(const std::string& path);
  /// Opens a file for reading and writing, and makes it if nobody has yet; never follows a symbolic
  /// link. For files that several processes write parts of. Throws as create.
  static File create_or_open(const std::string& path);
  /// As create, but the file has no name until give_name(): a process that is killed leaves
  /// nothing. Where that cannot be (not every file system can) it is made with its name at once.
  static File create_unnamed(const std::string& path);
  /// Gives the file its path, if it has none yet. Throws: HostResourceError.
  void give_name();
  bool has_name() const { return named_; }

  File() = default;
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();

  const std::string& path() const { return path_; }
  int descriptor() const { return descriptor_; }
  bool is_open() const { return descriptor_ >= 0; }

  /// Bytes in the file now.
  int64_t size() const;

  /// Fills `out` from `offset`. Throws: ModelError naming path and offset, also when the file ends
  /// before.
  void read_at(int64_t offset, std::span<std::byte> out) const;

  /// Writes all of `data` at `offset`. Throws: HostResourceError naming path and offset.
  void write_at(int64_t offset, std::span<const std::byte> data) const;

  /// Gives the file `bytes` bytes and the disk blocks for them (where the file system can), so that
  /// a full disk shows now. What is written already stays: processes that write parts of one file
  /// may each call it. Throws: HostResourceError.
  void allocate(int64_t bytes) const;

  /// Brings the contents to the disk. Throws: HostResourceError.
  void sync() const;

 private:
  File(std::string path, int descriptor) : path_(std::move(path)), descriptor_(descriptor) {}
  std::string path_;
  int descriptor_ = -1;
  bool named_ = true;
};

/// A file that is written aside, without a name or as `<path>.tmp-<nonce>`, and takes its name in
/// commit(); removed if never committed.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  const File& file() const { return file_; }

  /// Appends. Throws: HostResourceError.
  void write(std::span<const std::byte> data);
  void write(std::string_view text);

  /// Syncs the contents, renames over `path`, syncs the directory. Throws: HostResourceError.
  void commit();

 private:
  std::string path_;
  File file_;
  int64_t written_bytes_ = 0;
  bool committed_ = false;
};

/// `<path>.tmp-<nonce>`, a name that no other process or thread of this host uses.
std::string temporary_name(std::string_view path);

/// Renames over `to` (same file system). Throws: HostResourceError.
void rename_file(const std::string& from, const std::string& to);

/// Makes the directory's entries (renames, new files) durable. Throws: HostResourceError.
void sync_directory(const std::string& directory);

/// Whole file as text. Throws: ModelError, also above `max_bytes` (default 1 GB).
std::string read_text(const std::string& path, int64_t max_bytes = 1'000'000'000);

/// AtomicFile of one text.
void write_text_atomic(const std::string& path, std::string_view text);

/// Directory part ("." when there is none) joined with nothing: "a/b" -> "a".
std::string parent_directory(const std::string& path);

}  // namespace fsdp::io
