#include "libfsdp/io/zip.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "libfsdp/base/error.h"

namespace fsdp::io {
namespace {

constexpr uint32_t kEndSignature = 0x06054b50, kEnd64Signature = 0x06064b50,
                   kLocator64Signature = 0x07064b50, kCentralSignature = 0x02014b50,
                   kLocalSignature = 0x04034b50;
constexpr int64_t kEndBytes = 22, kLocator64Bytes = 20, kEnd64Bytes = 56, kCentralBytes = 46,
                  kLocalBytes = 30;
constexpr uint64_t kMaxEntries = 1'000'000;
constexpr uint64_t kMaxDirectoryBytes = 256 << 20;
constexpr uint32_t kIn64 = 0xffffffff;  // The number is in the 64-bit extension.

/// Little-endian numbers of a piece of memory that has been read.
class Fields {
 public:
  explicit Fields(std::span<const std::byte> bytes) : bytes_(bytes) {}
  template <class T>
  T get(size_t at) const {
    if (at > bytes_.size() || bytes_.size() - at < sizeof(T))
      throw ModelError("the zip directory is cut off");
    T value;
    std::memcpy(&value, bytes_.data() + at, sizeof(T));
    return value;
  }
  uint16_t u16(size_t at) const { return get<uint16_t>(at); }
  uint32_t u32(size_t at) const { return get<uint32_t>(at); }
  uint64_t u64(size_t at) const { return get<uint64_t>(at); }
  std::span<const std::byte> part(size_t at, size_t bytes) const {
    if (at > bytes_.size() || bytes_.size() - at < bytes)
      throw ModelError("the zip directory is cut off");
    return bytes_.subspan(at, bytes);
  }
  size_t size() const { return bytes_.size(); }

 private:
  std::span<const std::byte> bytes_;
};

struct Entry {
  std::string name;
  uint64_t header_at = 0;  // Of the local header, from the archive's begin.
  uint64_t bytes = 0;
  uint64_t data_at = 0;
};

void check_name(const std::string& name) {
  const bool upward = name == ".." || name.starts_with("../") || name.ends_with("/..") ||
                      name.find("/../") != std::string::npos;
  if (name.empty() || name.front() == '/' || upward || name.find('\0') != std::string::npos ||
      name.find('\\') != std::string::npos)
    throw ModelError("the zip archive has an entry with a forbidden name");
}

class ZipReader {
 public:
  ZipReader(const File& file, int64_t at, int64_t bytes) : file_(file), at_(at), bytes_(bytes) {
    if (at < 0 || bytes < kEndBytes || at > file.size() || bytes > file.size() - at)
      throw ModelError("too short for a zip archive");
  }

  std::map<std::string, ZipEntry> run() {
    find_directory();
    std::vector<Entry> entries = read_directory();
    for (Entry& entry : entries) find_data(entry);
    check_apart(entries);
    std::map<std::string, ZipEntry> result;
    for (const Entry& entry : entries) {
      const ZipEntry place{at_ + static_cast<int64_t>(entry.data_at),
                           static_cast<int64_t>(entry.bytes)};
      if (!result.emplace(entry.name, place).second)
        throw ModelError(cat("the zip archive has two entries '", entry.name, "'"));
    }
    return result;
  }

 private:
  std::vector<std::byte> read(uint64_t at, uint64_t bytes) const {
    if (at > static_cast<uint64_t>(bytes_) || bytes > static_cast<uint64_t>(bytes_) - at)
      throw ModelError("the zip archive points outside itself");
    std::vector<std::byte> data(bytes);
    file_.read_at(at_ + static_cast<int64_t>(at), data);
    return data;
  }

  /// torch.save writes no comment, so the end record is the last thing.
  void find_directory() {
    const auto end_at = static_cast<uint64_t>(bytes_ - kEndBytes);
    const auto end = read(end_at, kEndBytes);
    const Fields fields(end);
    if (fields.u32(0) != kEndSignature || fields.u16(20) != 0)
      throw ModelError("the end of a zip archive is not where it belongs");
    num_entries_ = fields.u16(10);
    directory_bytes_ = fields.u32(12);
    directory_at_ = fields.u32(16);
    if (num_entries_ == 0xffff || directory_bytes_ == kIn64 || directory_at_ == kIn64)
      find_directory64(end_at);
    if (num_entries_ > kMaxEntries || directory_bytes_ > kMaxDirectoryBytes)
      throw ModelError(
          cat("the zip archive claims ", num_entries_, " entries in ", directory_bytes_, " bytes"));
  }

  void find_directory64(uint64_t end_at) {
    if (end_at < kLocator64Bytes) throw ModelError("the zip archive lacks its 64-bit end");
    const auto locator = read(end_at - kLocator64Bytes, kLocator64Bytes);
    if (Fields(locator).u32(0) != kLocator64Signature)
      throw ModelError("the zip archive lacks its 64-bit end");
    const auto end = read(Fields(locator).u64(8), kEnd64Bytes);
    const Fields fields(end);
    if (fields.u32(0) != kEnd64Signature) throw ModelError("the zip archive lacks its 64-bit end");
    num_entries_ = fields.u64(32);
    directory_bytes_ = fields.u64(40);
    directory_at_ = fields.u64(48);
  }

  std::vector<Entry> read_directory() const {
    const auto bytes = read(directory_at_, directory_bytes_);
    const Fields fields(bytes);
    std::vector<Entry> entries;
    size_t at = 0;
    for (uint64_t i = 0; i < num_entries_; ++i) {
      if (fields.u32(at) != kCentralSignature) throw ModelError("the zip directory is damaged");
      const size_t name_bytes = fields.u16(at + 28), extra_bytes = fields.u16(at + 30);
      const auto name = fields.part(at + kCentralBytes, name_bytes);
      Entry entry{.name = {reinterpret_cast<const char*>(name.data()), name.size()}};
      check_name(entry.name);
      const bool encrypted = (fields.u16(at + 8) & 1) != 0;
      if (encrypted || fields.u16(at + 10) != 0)
        throw ModelError(cat("entry '", entry.name,
                             "' of the zip archive is compressed or "
                             "encrypted, torch.save stores plain bytes"));
      read_sizes(fields, at, fields.part(at + kCentralBytes + name_bytes, extra_bytes), entry);
      entries.push_back(std::move(entry));
      at += kCentralBytes + name_bytes + extra_bytes + fields.u16(at + 32);
    }
    if (at != fields.size()) throw ModelError("the zip directory is damaged");
    return entries;
  }

  /// Sizes and offset of the entry at `at`, those that do not fit into 32 bits from `extra`.
  static void read_sizes(const Fields& fields, size_t at, std::span<const std::byte> extra,
                         Entry& entry) {
    uint64_t stored = fields.u32(at + 20);
    entry.bytes = fields.u32(at + 24);
    entry.header_at = fields.u32(at + 42);
    const Fields more(extra);
    for (size_t e = 0; e + 4 <= extra.size();) {
      const size_t id = more.u16(e), bytes = more.u16(e + 2);
      size_t value = e + 4;
      e += 4 + bytes;
      if (id != 1) continue;
      for (uint64_t* number : {&entry.bytes, &stored, &entry.header_at}) {
        if (*number != kIn64) continue;
        *number = more.u64(value);
        value += 8;
      }
      if (value > e) throw ModelError("the zip directory is damaged");
    }
    if (stored != entry.bytes)
      throw ModelError(cat("entry '", entry.name, "' of the zip archive has two sizes"));
  }

  void find_data(Entry& entry) const {
    const auto header = read(entry.header_at, kLocalBytes);
    const Fields fields(header);
    if (fields.u32(0) != kLocalSignature || fields.u16(8) != 0)
      throw ModelError(cat("entry '", entry.name, "' of the zip archive has no header"));
    entry.data_at = entry.header_at + kLocalBytes + fields.u16(26) + fields.u16(28);
    const auto end = static_cast<uint64_t>(bytes_);
    if (entry.data_at > end || entry.bytes > end - entry.data_at)
      throw ModelError(cat("entry '", entry.name, "' reaches outside the zip archive"));
  }

  void check_apart(std::vector<Entry>& entries) const {
    std::sort(entries.begin(), entries.end(),
              [](const Entry& a, const Entry& b) { return a.header_at < b.header_at; });
    for (size_t i = 0; i < entries.size(); ++i) {
      const uint64_t next = i + 1 < entries.size() ? entries[i + 1].header_at : directory_at_;
      if (entries[i].data_at + entries[i].bytes > next)
        throw ModelError(cat("entry '", entries[i].name, "' of the zip archive overlaps another"));
    }
  }

  const File& file_;
  int64_t at_, bytes_;
  uint64_t num_entries_ = 0, directory_at_ = 0, directory_bytes_ = 0;
};

}  // namespace

std::map<std::string, ZipEntry> read_zip(const File& file, int64_t at, int64_t bytes) {
  return ZipReader(file, at, bytes).run();
}

}  // namespace fsdp::io
