#include "tests/support/system_calls.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <linux/limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

namespace fsdp::testing {
namespace {

/// A fault that waits for its call. Kept for good once made: threads may still look at it.
struct Armed {
  Fault fault;
  std::string directory;
  std::atomic<int64_t> calls{0};
  std::atomic<bool> happened{false};
};

thread_local Armed* armed = nullptr;
thread_local bool inside = false;  // Of one of these functions: what it calls is not counted.

class Inside {
 public:
  Inside() : before_(inside) { inside = true; }
  ~Inside() { inside = before_; }

 private:
  bool before_;
};

std::mutex log_mutex;
std::atomic<bool> logging{false};
std::string logged_directory;
std::vector<LoggedCall> log_of_calls;

bool is_below(std::string_view path, std::string_view directory) {
  return path == directory || (path.starts_with(directory) && path[directory.size()] == '/');
}

std::string path_of(int descriptor) {
  char path[PATH_MAX];
  const std::string link = "/proc/self/fd/" + std::to_string(descriptor);
  const ssize_t bytes = ::readlink(link.c_str(), path, sizeof path);
  return bytes < 0 ? std::string() : std::string(path, static_cast<size_t>(bytes));
}

std::string path_at(int directory, const char* path) {
  if (path[0] == '/' || directory == AT_FDCWD) return path;
  return path_of(directory) + "/" + path;
}

/// Whether this call is to fail.
bool fails(CallKind kind, const std::string& path) {
  if (armed == nullptr || armed->fault.kind != kind || !is_below(path, armed->directory))
    return false;
  const int64_t n = armed->calls++;
  const bool hit = armed->fault.persistent ? n >= armed->fault.nth : n == armed->fault.nth;
  if (hit) armed->happened = true;
  return hit;
}

bool watches() { return !inside && (armed != nullptr || logging.load(std::memory_order_relaxed)); }

int fail() {
  errno = armed->fault.code;
  return -1;
}

ino_t inode_of(int descriptor, bool* is_directory = nullptr) {
  struct stat status;
  if (::fstat(descriptor, &status) != 0) return 0;
  if (is_directory != nullptr) *is_directory = S_ISDIR(status.st_mode);
  return status.st_ino;
}

/// Does the call and logs it, so that the order of the log is one in which the calls took effect.
template <class Call>
auto logged(const std::string& path, LoggedCall entry, Call call) {
  if (!logging || !is_below(path, logged_directory)) return call();
  const std::lock_guard lock(log_mutex);
  const auto result = call();
  if (result >= 0 && logging) {
    if (entry.path.empty()) entry.path = path;
    log_of_calls.push_back(std::move(entry));
  }
  return result;
}

int open_here(int directory, const char* path, int flags, mode_t mode) {
  const auto call = [&] {
    return static_cast<int>(::syscall(SYS_openat, directory, path, flags, mode));
  };
  if (!watches()) return call();
  const Inside guard;
  const std::string full = path_at(directory, path);
  if (fails(CallKind::kOpen, full)) return fail();
  if (!logging || !is_below(full, logged_directory) || (flags & O_CREAT) == 0) return call();
  const std::lock_guard lock(log_mutex);
  struct stat status;
  const bool existed = ::lstat(full.c_str(), &status) == 0;
  const int descriptor = call();
  if (descriptor >= 0 && !existed)
    log_of_calls.push_back({LoggedCall::Kind::kMakeFile, full, {}, inode_of(descriptor), 0, {}});
  return descriptor;
}

ssize_t write_here(int descriptor, const void* data, size_t bytes, off_t offset, bool positioned) {
  const auto call = [&](size_t count) -> ssize_t {
    if (positioned) return ::syscall(SYS_pwrite64, descriptor, data, count, offset);
    return ::syscall(SYS_write, descriptor, data, count);
  };
  if (!watches()) return call(bytes);
  const Inside guard;
  const std::string path = path_of(descriptor);
  if (fails(CallKind::kWrite, path)) {
    if (armed->fault.code != 0) return fail();
    bytes = std::max<size_t>(bytes / 2, 1);
  }
  LoggedCall entry{LoggedCall::Kind::kWrite, {}, {}, 0, offset, {}};
  if (logging) {
    entry.inode = inode_of(descriptor);
    entry.data.assign(static_cast<const char*>(data), bytes);
  }
  return logged(path, std::move(entry), [&] { return call(bytes); });
}

int sync_here(int descriptor, int number) {
  const auto call = [&] { return static_cast<int>(::syscall(number, descriptor)); };
  if (!watches()) return call();
  const Inside guard;
  const std::string path = path_of(descriptor);
  if (fails(CallKind::kSync, path)) return fail();
  LoggedCall entry;
  bool is_directory = false;
  entry.inode = inode_of(descriptor, &is_directory);
  entry.kind = is_directory ? LoggedCall::Kind::kSyncDirectory : LoggedCall::Kind::kSyncFile;
  return logged(path, std::move(entry), call);
}

int resize_here(int descriptor, int64_t bytes, bool grows_only, const std::function<int()>& call) {
  if (!watches()) return call();
  const Inside guard;
  const std::string path = path_of(descriptor);
  if (fails(CallKind::kAllocate, path)) return fail();
  struct stat status {};
  ::fstat(descriptor, &status);
  LoggedCall entry{LoggedCall::Kind::kResize, {}, {}, status.st_ino, bytes, {}};
  if (status.st_size == bytes || (grows_only && status.st_size > bytes)) return call();
  return logged(path, std::move(entry), call);
}

int rename_here(int old_directory, const char* from, int new_directory, const char* to,
                unsigned flags) {
  const auto call = [&] {
    return static_cast<int>(
        ::syscall(SYS_renameat2, old_directory, from, new_directory, to, flags));
  };
  if (!watches()) return call();
  const Inside guard;
  const std::string path = path_at(old_directory, from);
  if (fails(CallKind::kRename, path)) return fail();
  LoggedCall entry;
  entry.kind =
      (flags & RENAME_EXCHANGE) != 0 ? LoggedCall::Kind::kExchange : LoggedCall::Kind::kRename;
  entry.path = path;
  entry.to = path_at(new_directory, to);
  return logged(path, std::move(entry), call);
}

int remove_here(int directory, const char* name, int flags) {
  const auto call = [&] {
    return static_cast<int>(::syscall(SYS_unlinkat, directory, name, flags));
  };
  if (!watches()) return call();
  const Inside guard;
  const std::string path = path_at(directory, name);
  if (fails(CallKind::kUnlink, path)) return fail();
  return logged(path, {LoggedCall::Kind::kRemove, path, {}, 0, 0, {}}, call);
}

void* allocate(std::size_t bytes) {
  if (armed != nullptr && !inside && armed->fault.kind == CallKind::kNew &&
      fails(CallKind::kNew, armed->directory)) {
    throw std::bad_alloc();
  }
  void* memory = std::malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

std::string_view name_of(CallKind kind) {
  constexpr std::string_view kNames[] = {"open", "mkdir",  "write",  "read", "allocate",
                                         "sync", "rename", "unlink", "new"};
  return kNames[static_cast<size_t>(kind)];
}

FaultScope::FaultScope(Fault fault, std::string directory) : previous_(armed) {
  auto next = std::make_unique<Armed>();
  next->fault = fault;
  next->directory = std::move(directory);
  armed = next.release();
}

FaultScope::~FaultScope() { armed = static_cast<Armed*>(previous_); }

bool FaultScope::happened() const { return armed->happened; }

void* FaultScope::current() { return armed; }
void FaultScope::inherit(void* scope) { armed = static_cast<Armed*>(scope); }

void start_log(const std::string& directory) {
  const std::lock_guard lock(log_mutex);
  logged_directory = directory;
  log_of_calls.clear();
  logging = true;
}

void log_mark(const std::string& text) {
  const std::lock_guard lock(log_mutex);
  log_of_calls.push_back({LoggedCall::Kind::kMark, text, {}, 0, 0, {}});
}

std::vector<LoggedCall> take_log() {
  const std::lock_guard lock(log_mutex);
  logging = false;
  return std::move(log_of_calls);
}

}  // namespace fsdp::testing

// The C library's names, whose declarations these must match.
using namespace fsdp::testing;  // NOLINT: only what follows.

extern "C" {

static mode_t mode_of(int flags, va_list arguments) {
  return (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
}

#define FSDP_DEFINE_OPEN(name)                                     \
  int name(const char* path, int flags, ...) {                     \
    va_list arguments;                                             \
    va_start(arguments, flags);                                    \
    const mode_t mode = mode_of(flags, arguments);                 \
    va_end(arguments);                                             \
    return fsdp::testing::open_here(AT_FDCWD, path, flags, mode);  \
  }                                                                \
  int name##at(int directory, const char* path, int flags, ...) {  \
    va_list arguments;                                             \
    va_start(arguments, flags);                                    \
    const mode_t mode = mode_of(flags, arguments);                 \
    va_end(arguments);                                             \
    return fsdp::testing::open_here(directory, path, flags, mode); \
  }
FSDP_DEFINE_OPEN(open)
#undef FSDP_DEFINE_OPEN

int mkdir(const char* path, mode_t mode) noexcept {
  const auto call = [&] { return static_cast<int>(::syscall(SYS_mkdir, path, mode)); };
  if (!watches()) return call();
  const Inside guard;
  if (fails(CallKind::kMkdir, path)) return fail();
  return logged(path, {LoggedCall::Kind::kMakeDirectory, path, {}, 0, 0, {}}, call);
}

ssize_t write(int descriptor, const void* data, size_t bytes) {
  return write_here(descriptor, data, bytes, 0, false);
}
ssize_t pwrite(int descriptor, const void* data, size_t bytes, off_t offset) {
  return write_here(descriptor, data, bytes, offset, true);
}

ssize_t pread(int descriptor, void* data, size_t bytes, off_t offset) {
  const auto call = [&] { return ::syscall(SYS_pread64, descriptor, data, bytes, offset); };
  if (!watches()) return call();
  const Inside guard;
  if (fails(CallKind::kRead, path_of(descriptor))) {
    if (armed->fault.code != 0) return fail();
    bytes = std::max<size_t>(bytes / 2, 1);
  }
  return call();
}

int fsync(int descriptor) { return sync_here(descriptor, SYS_fsync); }
int fdatasync(int descriptor) { return sync_here(descriptor, SYS_fdatasync); }

int fallocate(int descriptor, int mode, off_t at, off_t bytes) {
  return resize_here(descriptor, at + bytes, true, [&] {
    return static_cast<int>(::syscall(SYS_fallocate, descriptor, mode, at, bytes));
  });
}
int ftruncate(int descriptor, off_t bytes) noexcept {
  return resize_here(descriptor, bytes, false,
                     [&] { return static_cast<int>(::syscall(SYS_ftruncate, descriptor, bytes)); });
}

int rename(const char* from, const char* to) noexcept {
  return rename_here(AT_FDCWD, from, AT_FDCWD, to, 0);
}
int renameat2(int old_directory, const char* from, int new_directory, const char* to,
              unsigned flags) noexcept {
  return rename_here(old_directory, from, new_directory, to, flags);
}

int unlink(const char* path) noexcept { return remove_here(AT_FDCWD, path, 0); }
int unlinkat(int directory, const char* path, int flags) noexcept {
  return remove_here(directory, path, flags);
}
int rmdir(const char* path) noexcept { return remove_here(AT_FDCWD, path, AT_REMOVEDIR); }

}  // extern "C"

void* operator new(std::size_t bytes) { return fsdp::testing::allocate(bytes); }
void* operator new[](std::size_t bytes) { return fsdp::testing::allocate(bytes); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
