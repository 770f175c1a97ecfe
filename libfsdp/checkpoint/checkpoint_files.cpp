#include "libfsdp/checkpoint/checkpoint_files.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <memory>
#include <new>
#include <random>
#include <system_error>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/base/log.h"
#include "libfsdp/checkpoint/joined.h"
#include "libfsdp/io/file.h"

namespace fsdp::checkpoint {
namespace {

constexpr std::string_view kCheckpointPrefix = "checkpoint-";
constexpr std::string_view kTemporaryPrefix = ".tmp-checkpoint-";
constexpr std::string_view kModelPrefix = ".tmp-model-";
constexpr std::string_view kRemovedPrefix = ".tmp-removed-";
constexpr std::string_view kLatestPrefix = ".tmp-latest-";
constexpr std::string_view kOldPrefix = ".old-checkpoint-";

[[noreturn]] void fail(const std::string& what, int code) {
  const std::string text =
      joined("[checkpoint] ", what, ": ", std::generic_category().message(code));
  if (code == EACCES || code == EPERM || code == EROFS || code == ENOTDIR || code == ENOENT)
    throw ConfigError(text);
  throw HostResourceError(text);
}

std::string nonce() {
  std::random_device device;
  std::array<char, 17> text;
  std::snprintf(text.data(), text.size(), "%08x%08x", static_cast<unsigned>(device()),
                static_cast<unsigned>(device()));
  return text.data();
}

std::optional<int64_t> number_of(std::string_view digits) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc() || end != digits.data() + digits.size()) return std::nullopt;
  // "007" and "-7" are not what checkpoint_name() makes.
  if (value < 0 || std::to_string(value) != digits) return std::nullopt;
  return value;
}

bool is_dots(std::string_view name) { return name == "." || name == ".."; }

bool cannot(int code) { return code == EINVAL || code == ENOSYS || code == EOPNOTSUPP; }

/// False if `to` exists.
bool rename_unless_taken(const std::string& from, const std::string& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return true;
  int code = errno;
  if (cannot(code)) {  // Over a checkpoint, which is not empty, a plain rename fails too.
    if (name_exists(to)) return false;
    if (::rename(from.c_str(), to.c_str()) == 0) return true;
    code = errno;
  }
  if (code == EEXIST || code == ENOTEMPTY) return false;
  fail(cat(from, ": rename to ", to), code);
}

/// Removes a file, or a directory with all that is in it; 0 or an errno. Follows no links, and
/// needs no heap of ours: it has to work when memory is what has run out.
int remove_tree_at(int parent, const char* name) {
  constexpr int kAttempts = 4;  // A file may be made, or fail to go, in the meantime.
  int code = 0;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    if (::unlinkat(parent, name, 0) == 0 || errno == ENOENT) return 0;
    code = errno;
    if (code != EISDIR && code != EPERM) continue;
    const int descriptor = ::openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR* const directory = descriptor < 0 ? nullptr : ::fdopendir(descriptor);
    if (directory == nullptr) {
      code = errno;
      if (descriptor >= 0) ::close(descriptor);
      continue;
    }
    while (const dirent* const entry = ::readdir(directory)) {
      if (!is_dots(entry->d_name)) remove_tree_at(descriptor, entry->d_name);
    }
    ::closedir(directory);
    if (::unlinkat(parent, name, AT_REMOVEDIR) == 0 || errno == ENOENT) return 0;
    code = errno;
  }
  return code;
}

void remove_tree_quietly(const std::string& path) noexcept {
  const int code = remove_tree_at(AT_FDCWD, path.c_str());
  if (code == 0) return;
  try {
    log::warning(
        cat("[checkpoint] ", path, ": cannot be removed: ", std::generic_category().message(code)));
  } catch (const std::bad_alloc&) {
    log::warning("[checkpoint] a temporary directory cannot be removed");
  }
}

bool is_leftover(std::string_view name) {
  return name.starts_with(kTemporaryPrefix) || name.starts_with(kRemovedPrefix) ||
         name.starts_with(kModelPrefix) || name.starts_with(kLatestPrefix);
}

}  // namespace

std::string checkpoint_name(int64_t step) { return joined(kCheckpointPrefix, step); }

std::optional<int64_t> step_of_name(std::string_view name) {
  if (!name.starts_with(kCheckpointPrefix)) return std::nullopt;
  return number_of(name.substr(kCheckpointPrefix.size()));
}

std::string temporary_model_name() { return joined(kModelPrefix, nonce()); }

std::optional<int64_t> step_of_old_name(std::string_view name) {
  if (!name.starts_with(kOldPrefix)) return std::nullopt;
  name.remove_prefix(kOldPrefix.size());
  return number_of(name.substr(0, name.find('-')));
}

// Not std::filesystem's iterators: those of GCC 12 end the program when memory runs out.
std::vector<std::string> names_in(const std::string& directory) {
  const std::unique_ptr<DIR, int (*)(DIR*)> open(::opendir(directory.c_str()), &::closedir);
  if (open == nullptr) fail(cat(directory, ": cannot list the directory"), errno);
  std::vector<std::string> names;
  for (;;) {
    errno = 0;
    const dirent* const entry = ::readdir(open.get());
    if (entry == nullptr) break;
    if (!is_dots(entry->d_name)) names.emplace_back(entry->d_name);
  }
  if (errno != 0) fail(cat(directory, ": cannot list the directory"), errno);
  std::sort(names.begin(), names.end());
  return names;
}

std::string without_end_slash(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

bool name_exists(const std::string& path) {
  struct stat status;
  return ::lstat(path.c_str(), &status) == 0;
}

void make_directory(const std::string& path) {
  if (::mkdir(path.c_str(), 0755) == 0) return;
  const int code = errno;
  struct stat status;
  if (code == EEXIST && ::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode)) return;
  fail(cat(path, ": cannot make the directory"), code == EEXIST ? ENOTDIR : code);
}

void make_directories(const std::string& path) {
  struct stat status;
  if (::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode)) return;
  const std::string parent = io::parent_directory(path);
  if (parent != path) make_directories(parent);
  make_directory(path);
  io::sync_directory(parent);
}

std::optional<Claim> Claim::take(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (descriptor < 0) return std::nullopt;
  Claim claim(descriptor);
  if (::flock(descriptor, LOCK_EX | LOCK_NB) != 0) return std::nullopt;
  // Whoever had it before may have removed it in the meantime.
  struct stat locked;
  struct stat named;
  if (::fstat(descriptor, &locked) != 0 || ::lstat(path.c_str(), &named) != 0 ||
      locked.st_ino != named.st_ino || locked.st_dev != named.st_dev) {
    return std::nullopt;
  }
  return claim;
}

Claim::Claim(Claim&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}

Claim& Claim::operator=(Claim&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

Claim::~Claim() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

Doomed::Doomed(Doomed&& other) noexcept
    : path_(std::exchange(other.path_, {})), claim_(std::move(other.claim_)) {}

Doomed& Doomed::operator=(Doomed&& other) noexcept {
  path_.swap(other.path_);
  std::swap(claim_, other.claim_);
  return *this;
}

Doomed::~Doomed() {
  if (!path_.empty()) remove_tree_quietly(path_);
}

TemporaryCheckpoint::TemporaryCheckpoint(std::string parent, int64_t step)
    : parent_(std::move(parent)),
      name_(joined(kTemporaryPrefix, step, "-", nonce())),
      path_(joined(parent_, "/", name_)),
      spare_path_(joined(parent_, "/", kOldPrefix, name_.substr(kTemporaryPrefix.size()))) {
  if (::mkdir(path_.c_str(), 0755) != 0) fail(cat(path_, ": cannot make the directory"), errno);
  auto claim = Claim::take(path_);
  if (claim) claim_ = std::move(*claim);
  // No claim: the file system knows no locks, and then nobody else gets one either.
}

TemporaryCheckpoint::~TemporaryCheckpoint() { remove(); }

void TemporaryCheckpoint::remove() noexcept { take_remains(); }

Doomed TemporaryCheckpoint::take_remains() noexcept {
  return {std::exchange(path_, {}), std::move(old_claim_)};
}

void TemporaryCheckpoint::publish(const std::string& name, bool overwrite) {
  const std::string final_path = joined(parent_, "/", name);
  if (overwrite && name_exists(final_path)) {
    exchange_names(final_path);
  } else {
    take_name(final_path);
    path_.clear();
  }
}

void TemporaryCheckpoint::take_name(const std::string& final_path) {
  if (!rename_unless_taken(path_, final_path)) {
    throw ConfigError(cat("[checkpoint] ", final_path, " exists already and is not overwritten"));
  }
  try {
    io::sync_directory(parent_);
  } catch (...) {
    // Without this sync nobody knows which name would survive a power loss: there is no checkpoint.
    if (::rename(final_path.c_str(), path_.c_str()) != 0) path_.clear();
    throw;
  }
}

void TemporaryCheckpoint::exchange_names(const std::string& final_path) {
  // The old one gets a temporary name in a moment.
  if (auto claim = Claim::take(final_path)) old_claim_ = std::move(*claim);
  const auto exchange = [&] {
    return ::renameat2(AT_FDCWD, path_.c_str(), AT_FDCWD, final_path.c_str(), RENAME_EXCHANGE);
  };
  if (exchange() == 0) {
    try {
      io::sync_directory(parent_);
    } catch (...) {
      if (exchange() != 0) path_.clear();
      throw;
    }
    return;  // The old checkpoint is at path_ now.
  }
  if (!cannot(errno)) fail(cat(path_, ": exchange with ", final_path), errno);
  // Between these renames both are whole: the old one has its step in its name, and whoever comes
  // next restores it.
  if (::rename(final_path.c_str(), spare_path_.c_str()) != 0)
    fail(cat(final_path, ": rename to ", spare_path_), errno);
  try {
    take_name(final_path);
  } catch (...) {
    ::rename(spare_path_.c_str(), final_path.c_str());
    throw;
  }
  path_.swap(spare_path_);
}

Doomed remove_checkpoint(const std::string& parent, const std::string& name) {
  const std::string path = joined(parent, "/", name);
  std::string removed = joined(parent, "/", kRemovedPrefix, name, "-", nonce());
  auto claim = Claim::take(path);
  if (::rename(path.c_str(), removed.c_str()) != 0) fail(cat(path, ": rename to ", removed), errno);
  try {
    io::sync_directory(parent);
  } catch (...) {
    ::rename(removed.c_str(), path.c_str());
    throw;
  }
  return {std::move(removed), claim ? std::move(*claim) : Claim()};
}

void write_latest(const std::string& parent, const std::string& name) {
  const std::string temporary = joined(parent, "/", kLatestPrefix, nonce());
  try {
    const io::File file = io::File::create(temporary);
    const auto claim = Claim::take(temporary);
    const std::string text = joined(name, "\n");
    file.write_at(0, std::as_bytes(std::span(text.data(), text.size())));
    file.sync();
    io::rename_file(temporary, joined(parent, "/", kLatestFile));
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  io::sync_directory(parent);
}

std::optional<std::string> read_latest(const std::string& parent) {
  const std::string path = joined(parent, "/", kLatestFile);
  if (!name_exists(path)) return std::nullopt;
  try {
    std::string name = io::read_text(path, 256);
    while (!name.empty() && (name.back() == '\n' || name.back() == '\r')) name.pop_back();
    if (step_of_name(name)) return name;
  } catch (const Error&) {
    // A hint that cannot be read is no hint.
  }
  return std::nullopt;
}

std::vector<std::string> remove_leftovers(const std::string& parent) {
  std::vector<std::string> gone;
  for (const std::string& name : names_in(parent)) {
    const auto old_step = step_of_old_name(name);
    if (!is_leftover(name) && !old_step) continue;
    const std::string path = joined(parent, "/", name);
    const auto claim = Claim::take(path);
    if (!claim) continue;
    if (old_step && rename_unless_taken(path, joined(parent, "/", checkpoint_name(*old_step)))) {
      io::sync_directory(parent);
      continue;
    }
    remove_tree_quietly(path);
    gone.push_back(name);
  }
  return gone;
}

}  // namespace fsdp::checkpoint
