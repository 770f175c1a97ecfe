#include "libfsdp/checkpoint/verify.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <map>
#include <new>
#include <set>
#include <thread>
#include <tuple>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/checkpoint_files.h"
#include "libfsdp/checkpoint/joined.h"
#include "libfsdp/io/file.h"

namespace fsdp::checkpoint {
namespace {

constexpr int64_t kBufferBytes = 4 << 20;
constexpr size_t kMaxDamages = 1000;  // More would help nobody.

/// One pass over one checkpoint.
class Verification {
 public:
  Verification(VerifyReport& report, VerifyShare share) : report_(report), share_(share) {}

  void run() {
    const Manifest manifest = read_manifest(report_.directory);
    report_.step = manifest.step;
    report_.world_size = manifest.world_size;
    report_.time = manifest.time;
    report_.strategy = manifest.strategy;
    report_.files = static_cast<int64_t>(manifest.files.size());
    report_.bytes = manifest.file_bytes();
    compare_names(manifest);
    read_ranges(manifest);
    check_coverage(manifest);
    check_digests();
  }

  void damage(const std::string& file, const std::string& tensor, const std::string& what) {
    if (report_.damages.size() >= kMaxDamages) return;
    report_.damages.push_back({joined(report_.directory, "/", file), tensor, what});
  }

 private:
  /// Would a reader of models or checkpoints open such a file of its own accord?
  static bool misleads(std::string_view name) {
    return name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") ||
           name.ends_with(".bin") || name.ends_with(".pt") || name.ends_with(".pth") ||
           name.ends_with(".distcp") || name.ends_with(".metadata");
  }

  void compare_names(const Manifest& manifest) {
    std::map<std::string, int64_t> found;
    for (const FileBytes& file : files_below(report_.directory)) found[file.file] = file.bytes;
    for (const FileBytes& file : manifest.files) {
      const auto there = found.find(file.file);
      if (there == found.end()) {
        damage(file.file, "", "it is missing");
        missing_.insert(file.file);
        continue;
      }
      if (there->second != file.bytes) sizes_differ_.emplace(file.file, there->second);
      found.erase(there);
    }
    for (const auto& [name, bytes] : found) {
      if (misleads(name)) {
        damage(name, "", "it does not belong to this checkpoint, and a reader could take it");
      } else {
        report_.extra.push_back(name);
      }
    }
  }

  void read_ranges(const Manifest& manifest) {
    for (const RangeList& list : manifest.lists) {
      try {
        const auto ranges = read_list(report_.directory, list);
        ranges_.insert(ranges_.end(), ranges.begin(), ranges.end());
      } catch (const ModelError& error) {
        damage(list.file, "", error.what());
      }
    }
    std::sort(ranges_.begin(), ranges_.end(), [](const WrittenRange& a, const WrittenRange& b) {
      return std::tie(a.file, a.begin) < std::tie(b.file, b.begin);
    });
  }

  /// Do the ranges of each file cover it, once?
  void check_coverage(const Manifest& manifest) {
    const bool all_lists = report_.damages.empty();
    size_t at = 0;
    for (const FileBytes& file : manifest.files) {
      for (; at < ranges_.size() && ranges_[at].file < file.file; ++at)
        damage(ranges_[at].file, ranges_[at].tensor, "a list names it, the manifest does not");
      int64_t covered = 0;
      for (; at < ranges_.size() && ranges_[at].file == file.file; ++at) {
        const WrittenRange& range = ranges_[at];
        if (range.begin != covered && (all_lists || range.begin < covered)) {
          damage(file.file, range.tensor,
                 cat("ranges ", range.begin < covered ? "overlap" : "leave a gap", " at byte ",
                     std::min(covered, range.begin)));
        }
        covered = range.begin + range.bytes;
      }
      if (covered > file.bytes || (covered != file.bytes && all_lists)) {
        damage(file.file, "", cat("its ranges end at byte ", covered, " of ", file.bytes));
      }
    }
    for (; at < ranges_.size(); ++at)
      damage(ranges_[at].file, ranges_[at].tensor, "a list names it, the manifest does not");
  }

  void check_digests() {
    // Ranges are divided by their bytes: a share begins where the last ended.
    int64_t total = 0;
    for (const WrittenRange& range : ranges_) {
      if (__builtin_add_overflow(total, range.bytes, &total))
        throw ModelError("the sizes of its ranges overflow");
    }
    const auto limit = [&](int64_t k) {
      return total / share_.count * k + total % share_.count * k / share_.count;
    };
    int64_t before = 0;
    for (const WrittenRange& range : ranges_) {
      const int64_t middle = before + range.bytes / 2;
      before += range.bytes;
      if (middle >= limit(share_.index) && middle < limit(share_.index + 1)) check_digest(range);
    }
    // A size that differs shows in the ranges beyond the end; bytes too many do not.
    for (const auto& [name, bytes] : sizes_differ_) {
      const auto shown = [&, &file = name](const Damage& one) {
        return one.file == joined(report_.directory, "/", file);
      };
      if (std::none_of(report_.damages.begin(), report_.damages.end(), shown))
        damage(name, "", cat("it has ", bytes, " bytes, which is not what was written"));
    }
  }

  void check_digest(const WrittenRange& range) {
    if (missing_.contains(range.file)) return;
    try {
      open(range.file);
      buffer_.resize(static_cast<size_t>(kBufferBytes));
      hasher_.reset();
      for (int64_t at = 0; at < range.bytes;) {
        const auto part =
            std::span(buffer_).first(static_cast<size_t>(std::min(kBufferBytes, range.bytes - at)));
        file_.read_at(range.begin + at, part);
        hasher_.update(part);
        at += static_cast<int64_t>(part.size());
        report_.read_bytes += static_cast<int64_t>(part.size());
      }
    } catch (const ModelError& error) {
      damage(range.file, range.tensor, error.what());
      return;
    }
    ++report_.digests;
    if (hasher_.digest() == range.digest) return;
    damage(range.file, range.tensor,
           cat("bytes ", range.begin, " to ", range.begin + range.bytes,
               ": their digest differs: they are not what was written"));
  }

  void open(const std::string& name) {
    if (file_.is_open() && open_name_ == name) return;
    file_ = io::File::open_read(joined(report_.directory, "/", name));
    open_name_ = name;
  }

  VerifyReport& report_;
  VerifyShare share_;
  std::vector<WrittenRange> ranges_;
  std::set<std::string> missing_;
  std::map<std::string, int64_t> sizes_differ_;
  io::File file_;
  std::string open_name_;
  std::vector<std::byte> buffer_;
  Hasher hasher_;
};

/// Adds what another share of the same checkpoint found.
void merge(VerifyReport& report, VerifyReport other) {
  report.read_bytes += other.read_bytes;
  report.digests += other.digests;
  const auto known = [&](const Damage& one) {
    return std::any_of(report.damages.begin(), report.damages.end(), [&](const Damage& other_one) {
      return std::tie(one.file, one.tensor, one.what) ==
             std::tie(other_one.file, other_one.tensor, other_one.what);
    });
  };
  for (Damage& one : other.damages) {
    if (!known(one)) report.damages.push_back(std::move(one));
  }
}

}  // namespace

std::string Damage::text() const {
  if (what.starts_with("[checkpoint] ")) return what;  // It names the file itself.
  return joined("[checkpoint] ", file, tensor.empty() ? "" : joined(", tensor '", tensor, "'"),
                ": ", what);
}

VerifyReport verify(const std::string& checkpoint, VerifyShare share) {
  const auto start = std::chrono::steady_clock::now();
  VerifyReport report;
  report.directory = without_end_slash(checkpoint);
  Verification verification(report, share);
  try {
    verification.run();
  } catch (const Error& error) {
    verification.damage(std::string(kManifestFile), "", error.what());
  }
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

VerifyReport verify_by_threads(const std::string& checkpoint, int threads) {
  const auto start = std::chrono::steady_clock::now();
  const auto count = static_cast<size_t>(std::max(threads, 1));
  std::vector<VerifyReport> reports(count);
  std::vector<std::exception_ptr> errors(count);
  std::vector<std::thread> workers;
  for (size_t i = 0; i < count; ++i) {
    workers.emplace_back([&, i] {
      try {
        reports[i] = verify(checkpoint, {static_cast<int64_t>(i), static_cast<int64_t>(count)});
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  VerifyReport report = std::move(reports[0]);
  for (size_t i = 1; i < count; ++i) merge(report, std::move(reports[i]));
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace fsdp::checkpoint
