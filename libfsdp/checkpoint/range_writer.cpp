#include "libfsdp/checkpoint/range_writer.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/checkpoint_files.h"
#include "libfsdp/checkpoint/joined.h"

namespace fsdp::checkpoint {
namespace {

constexpr size_t kCopyBytes = size_t{1} << 20;
constexpr int64_t kWritebackBytes = 8 << 20;
constexpr size_t kMaxNameBytes = 1024;

bool is_plain_name(std::string_view name) {
  return !name.empty() && name.size() <= 255 && name != "." && name != ".." &&
         name.find('\0') == std::string_view::npos;
}

}  // namespace

bool is_safe_name(std::string_view file) {
  if (file.size() > kMaxNameBytes) return false;
  for (size_t at = 0; at <= file.size();) {
    const size_t end = std::min(file.find('/', at), file.size());
    if (!is_plain_name(file.substr(at, end - at))) return false;
    at = end + 1;
  }
  return true;
}

RangeWriter::RangeWriter(std::string directory) : directory_(std::move(directory)) {
  struct stat status;
  if (::stat(directory_.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) {
    throw ConfigError(cat("[checkpoint] ", directory_,
                          ": this directory is not there. Hint: all ranks, on all hosts, must see "
                          "the same output directory."));
  }
}

std::string RangeWriter::path_for_new(const std::string& file) const {
  check_not_cancelled();
  check(is_safe_name(file), cat("checkpoint: '", file, "' is no name for a file in it"));
  check(!files_.contains(file), cat("checkpoint: ", file, " is made or opened twice"));
  for (size_t at = file.find('/'); at != std::string::npos; at = file.find('/', at + 1)) {
    make_directory(joined(directory_, "/", file.substr(0, at)));
  }
  return joined(directory_, "/", file);
}

void RangeWriter::add(const std::string& file, io::File opened, int64_t bytes) {
  opened.allocate(bytes);
  files_.emplace(file, OpenFile{std::move(opened), bytes});
}

void RangeWriter::create(const std::string& file, int64_t bytes) {
  add(file, io::File::create(path_for_new(file)), bytes);
}

void RangeWriter::share(const std::string& file, int64_t bytes) {
  add(file, io::File::create_or_open(path_for_new(file)), bytes);
}

const RangeWriter::OpenFile& RangeWriter::open_file(const std::string& file) const {
  const auto found = files_.find(file);
  check(found != files_.end(), cat("checkpoint: ", file, " is written before it is made"));
  return found->second;
}

void RangeWriter::write(const std::string& file, std::string_view tensor, int64_t at,
                        std::span<const std::byte> data) {
  begin(file, tensor, at);
  append(data);
  end();
}

void RangeWriter::begin(const std::string& file, std::string_view tensor, int64_t at) {
  check(!current_.has_value(), "checkpoint: a range begins within another");
  const OpenFile& target = open_file(file);
  check(at >= 0 && at <= target.bytes, cat("checkpoint: a range begins outside ", file));
  current_ = WrittenRange{file, std::string(tensor), at, 0, {}};
  current_file_ = &target;
  hasher_.reset();
  unsent_bytes_ = 0;
}

void RangeWriter::append(std::span<const std::byte> data) {
  check_not_cancelled();
  check(current_.has_value(), "checkpoint: bytes outside a range");
  const int64_t at = current_->begin + current_->bytes;
  const auto bytes = static_cast<int64_t>(data.size());
  check(bytes <= current_file_->bytes - at,
        cat("checkpoint: '", current_->tensor, "' does not fit into ", current_->file));
  // Piece by piece, so that the bytes are still in the cache when they are written.
  for (size_t done = 0; done < data.size(); done += kCopyBytes) {
    const auto piece = data.subspan(done, std::min(kCopyBytes, data.size() - done));
    hasher_.update(piece);
    current_file_->file.write_at(at + static_cast<int64_t>(done), piece);
    start_writeback(at + static_cast<int64_t>(done + piece.size()), piece.size());
  }
  current_->bytes += bytes;
}

// The disk begins while we write, so that finish() has less to wait for. An error shows there.
void RangeWriter::start_writeback(int64_t end, size_t bytes) {
  unsent_bytes_ += static_cast<int64_t>(bytes);
  if (unsent_bytes_ < kWritebackBytes) return;
  ::sync_file_range(current_file_->file.descriptor(), end - unsent_bytes_, unsent_bytes_,
                    SYNC_FILE_RANGE_WRITE);
  unsent_bytes_ = 0;
}

void RangeWriter::end() {
  check(current_.has_value(), "checkpoint: a range ends that has not begun");
  if (current_->bytes > 0) {
    current_->digest = hasher_.digest();
    written_bytes_ += current_->bytes;
    written_.push_back(std::move(*current_));
  }
  current_.reset();
}

void RangeWriter::write_file(const std::string& file, std::string_view content) {
  create(file, static_cast<int64_t>(content.size()));
  write(file, {}, 0, std::as_bytes(std::span(content.data(), content.size())));
}

void RangeWriter::copy_file(const std::string& from, const std::string& file) {
  const io::File source = io::File::open_read(from);
  const int64_t bytes = source.size();
  create(file, bytes);
  begin(file, {}, 0);
  std::vector<std::byte> buffer(
      static_cast<size_t>(std::min(bytes, static_cast<int64_t>(kCopyBytes))));
  for (int64_t at = 0; at < bytes;) {
    const auto part = std::span(buffer).first(
        static_cast<size_t>(std::min(bytes - at, static_cast<int64_t>(buffer.size()))));
    source.read_at(at, part);
    append(part);
    at += static_cast<int64_t>(part.size());
  }
  end();
}

void RangeWriter::finish() {
  check_not_cancelled();
  check(!current_.has_value(), "checkpoint: the writer finishes within a range");
  for (const auto& [name, open] : files_) open.file.sync();
  files_.clear();
}

void RangeWriter::check_not_cancelled() const {
  check(!cancelled_.load(std::memory_order_relaxed), "checkpoint: the save was given up");
}

}  // namespace fsdp::checkpoint
