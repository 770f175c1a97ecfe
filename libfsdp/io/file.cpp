#include "libfsdp/io/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <random>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/base/log.h"

namespace fsdp::io {
namespace {

constexpr size_t kMaxTransferBytes = size_t{1} << 30;  // Linux moves at most 2 GB a call.

std::string reason(int code) { return std::generic_category().message(code); }

[[noreturn]] void throw_write_error(const std::string& text, int code) {
  const std::string full = cat(text, ": ", reason(code));
  if (code == ENOSPC || code == EDQUOT || code == EFBIG) {
    throw HostResourceError(cat(full, ". Hint: free some space, or write to another disk."));
  }
  throw HostResourceError(full);
}

int open_retrying(const std::string& path, int flags) {
  int descriptor;
  do {
    descriptor = ::open(path.c_str(), flags | O_CLOEXEC, 0644);
  } while (descriptor < 0 && errno == EINTR);
  return descriptor;
}

std::string path_of_descriptor(int descriptor) { return cat("/proc/self/fd/", descriptor); }

int open_for_write(const std::string& path, int flags) {
  const int descriptor = open_retrying(path, O_RDWR | flags);
  if (descriptor >= 0) return descriptor;
  const int code = errno;
  const std::string text = cat(path, ": cannot open for writing");
  if (code == ENOSPC || code == EDQUOT || code == EIO) throw_write_error(text, code);
  throw ConfigError(cat(text, ": ", reason(code)));
}

struct stat status_of(int descriptor, const std::string& path) {
  struct stat status;
  if (::fstat(descriptor, &status) != 0) throw ModelError(cat(path, ": fstat: ", reason(errno)));
  return status;
}

}  // namespace

File File::open_read(const std::string& path) {
  // O_NONBLOCK: opening a FIFO that nobody writes must end in the message below, not hang.
  File file(path, open_retrying(path, O_RDONLY | O_NONBLOCK));
  if (!file.is_open()) throw ModelError(cat(path, ": cannot open: ", reason(errno)));
  const auto mode = status_of(file.descriptor_, path).st_mode;
  if (S_ISDIR(mode)) throw ModelError(cat(path, ": expected a file, got a directory"));
  if (!S_ISREG(mode)) throw ModelError(cat(path, ": expected a regular file"));
  return file;
}

File File::create(const std::string& path) {
  return File(path, open_for_write(path, O_CREAT | O_EXCL));
}

File File::create_unnamed(const std::string& path) {
  File file(path, open_retrying(parent_directory(path), O_RDWR | O_TMPFILE));
  file.named_ = false;
  // Its name will be given through /proc.
  if (file.is_open() && ::access(path_of_descriptor(file.descriptor_).c_str(), F_OK) == 0)
    return file;
  return create(path);
}

void File::give_name() {
  if (named_) return;
  if (::linkat(AT_FDCWD, path_of_descriptor(descriptor_).c_str(), AT_FDCWD, path_.c_str(),
               AT_SYMLINK_FOLLOW) != 0) {
    throw_write_error(cat(path_, ": give the file its name"), errno);
  }
  named_ = true;
}

File File::open_write(const std::string& path) { return File(path, open_for_write(path, 0)); }

File File::create_or_open(const std::string& path) {
  return File(path, open_for_write(path, O_CREAT | O_NOFOLLOW));
}

File::File(File&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      named_(other.named_) {}

File& File::operator=(File&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(descriptor_, other.descriptor_);
  std::swap(named_, other.named_);
  return *this;
}

File::~File() {
  if (is_open()) ::close(descriptor_);
}

int64_t File::size() const { return status_of(descriptor_, path_).st_size; }

void File::read_at(int64_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const size_t wanted = std::min(out.size(), kMaxTransferBytes);
    const ssize_t got = ::pread(descriptor_, out.data(), wanted, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw ModelError(cat(path_, ": read at offset ", offset, ": ", reason(errno)));
    if (got == 0) {
      throw ModelError(
          cat(path_, ": the file ends at offset ", offset, ", ", out.size(), " bytes early"));
    }
    out = out.subspan(static_cast<size_t>(got));
    offset += got;
  }
}

void File::write_at(int64_t offset, std::span<const std::byte> data) const {
  while (!data.empty()) {
    const size_t wanted = std::min(data.size(), kMaxTransferBytes);
    const ssize_t put = ::pwrite(descriptor_, data.data(), wanted, offset);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) throw_write_error(cat(path_, ": write at offset ", offset), errno);
    data = data.subspan(static_cast<size_t>(put));
    offset += put;
  }
}

// Not posix_fallocate: where the file system cannot reserve blocks, the C library writes zeros over
// what another process may have written in the meantime.
void File::allocate(int64_t bytes) const {
  int code = 0;
  if (bytes > 0) {
    do {
      code = ::fallocate(descriptor_, 0, 0, bytes) == 0 ? 0 : errno;
    } while (code == EINTR);
    if (code != 0 && code != EOPNOTSUPP && code != ENOSYS && code != EINVAL) {
      throw_write_error(cat(path_, ": reserve ", bytes, " bytes"), code);
    }
  }
  do {
    code = ::ftruncate(descriptor_, bytes) == 0 ? 0 : errno;
  } while (code == EINTR);
  if (code != 0) throw_write_error(cat(path_, ": set size"), code);
}

void File::sync() const {
  if (::fsync(descriptor_) != 0) throw_write_error(cat(path_, ": fsync"), errno);
}

AtomicFile::AtomicFile(std::string path)
    : path_(std::move(path)), file_(File::create_unnamed(temporary_name(path_))) {}

AtomicFile::~AtomicFile() {
  if (!committed_ && file_.has_name()) ::unlink(file_.path().c_str());
}

void AtomicFile::write(std::span<const std::byte> data) {
  file_.write_at(written_bytes_, data);
  written_bytes_ += static_cast<int64_t>(data.size());
}

void AtomicFile::write(std::string_view text) {
  write(std::as_bytes(std::span(text.data(), text.size())));
}

void AtomicFile::commit() {
  file_.sync();
  file_.give_name();
  rename_file(file_.path(), path_);
  committed_ = true;
  sync_directory(parent_directory(path_));
}

std::string temporary_name(std::string_view path) {
  static std::atomic<uint64_t> counter{(uint64_t{std::random_device{}()} << 32) ^
                                       std::random_device{}()};
  char nonce[40];
  std::snprintf(nonce, sizeof nonce, ".tmp-%d-%08x", static_cast<int>(::getpid()),
                static_cast<unsigned>(counter.fetch_add(1) & 0xffffffffU));
  return cat(path, nonce);
}

void rename_file(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) != 0)
    throw_write_error(cat(from, ": rename to ", to), errno);
}

void sync_directory(const std::string& directory) {
  const int descriptor = open_retrying(directory, O_RDONLY | O_DIRECTORY);
  if (descriptor < 0) throw_write_error(cat(directory, ": open directory"), errno);
  const int code = ::fsync(descriptor) == 0 ? 0 : errno;
  ::close(descriptor);
  // Some file systems cannot sync a directory; they say so with EINVAL.
  if (code != 0 && code != EINVAL) throw_write_error(cat(directory, ": fsync directory"), code);
}

std::string read_text(const std::string& path, int64_t max_bytes) {
  const File file = File::open_read(path);
  const int64_t size = file.size();
  if (size > max_bytes)
    throw ModelError(cat(path, ": ", size, " bytes, expected at most ", max_bytes));
  std::string text(static_cast<size_t>(size), '\0');
  file.read_at(0, std::as_writable_bytes(std::span(text.data(), text.size())));
  return text;
}

void write_text_atomic(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

std::string parent_directory(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

}  // namespace fsdp::io
