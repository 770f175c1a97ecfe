#include "libfsdp/checkpoint/load_state.h"

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <tuple>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/rectangles.h"

namespace fsdp::checkpoint {
namespace {

constexpr int64_t kDirectBytes = 64 << 10;

bool is_floating(std::optional<DType> dtype) {
  return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16 ||
         dtype == DType::kF64;
}

/// "\n  3 missing tensors: a, b, c"; at most a few names.
std::string listing(std::string_view what, const std::vector<std::string>& names) {
  constexpr size_t kMaxShown = 5;
  if (names.empty()) return "";
  std::string text = cat("\n  ", names.size(), " ", what, ": ");
  for (size_t i = 0; i < std::min(names.size(), kMaxShown); ++i)
    text += cat(i ? ", " : "", names[i]);
  if (names.size() > kMaxShown) text += cat(", and ", names.size() - kMaxShown, " more");
  return text;
}

using ByName = std::map<std::string, const StoredTensor*, std::less<>>;

/// The stored tensors by their names in the state.
ByName renamed(const StoredTensors& stored, const std::vector<PrefixRule>& prefixes) {
  ByName by_name;
  for (const auto& [stored_name, tensor] : stored.tensors()) {
    std::string name = stored_name;
    for (const PrefixRule& rule : prefixes) {
      if (!name.starts_with(rule.from)) continue;
      name.replace(0, rule.from.size(), rule.to);
      break;
    }
    const auto [at, is_new] = by_name.emplace(name, &tensor);
    if (!is_new)
      throw ModelError(cat(stored.directory(), ": '", at->second->name, "' and '", stored_name,
                           "' would both be called '", name, "'"));
  }
  return by_name;
}

/// The tensor of the state's name, or of one that stands in for it.
const StoredTensor* find_stored(const std::string& name, const ByName& by_name,
                                const StoredTensors& stored, const LoadOptions& options) {
  if (const auto found = by_name.find(name); found != by_name.end()) return found->second;
  for (const Alias& alias : options.aliases) {
    if (alias.name != name) continue;
    if (const auto found = by_name.find(alias.alias); found != by_name.end()) return found->second;
  }
  const auto dropped = stored.aliases().find(name);
  return dropped == stored.aliases().end() ? nullptr : stored.find(dropped->second);
}

bool fits(const StoredTensor& stored, const std::vector<int64_t>& shape) {
  if (stored.shape_is_known) return stored.shape == shape;
  // The last rectangles may be missing; uncovered_range() then says which.
  return stored.shape.size() == shape.size() &&
         std::equal(stored.shape.begin(), stored.shape.end(), shape.begin(), std::less_equal<>());
}

void check_covered(const StoredTensor& stored, const TensorPart& part,
                   const std::string& directory) {
  const auto hole = uncovered_range(stored, part.shape);
  if (!hole) return;
  throw ModelError(cat(directory, ": elements [", hole->first, ", ", hole->second, ") of tensor '",
                       part.name, "' ", io::shape_text(part.shape),
                       " are in no file. Hint: is a shard file missing?"));
}

/// What will be loaded into tensors[i] of the state; nullptr for nothing.
struct Match {
  std::vector<const StoredTensor*> sources;
  LoadReport report;
};

Match match(const StateDict& state, const StoredTensors& stored, const LoadOptions& options) {
  const ByName by_name = renamed(stored, options.prefixes);
  Match result;
  std::set<const StoredTensor*> used;
  std::set<std::string_view> known;
  for (const Alias& alias : options.aliases) known.insert(alias.alias);
  for (const TensorPart& part : state.tensors) {
    known.insert(part.name);
    const StoredTensor* source = find_stored(part.name, by_name, stored, options);
    if (source == nullptr) {
      result.report.missing.push_back(part.name);
    } else if (!fits(*source, part.shape)) {
      result.report.misshapen.push_back(cat(part.name, " ", io::shape_text(source->shape),
                                            " instead of ", io::shape_text(part.shape)));
    } else if (source->dtype != part.dtype &&
               !(options.convert && is_floating(source->dtype) && is_floating(part.dtype))) {
      result.report.wrong_type.push_back(
          cat(part.name, " ", source->dtype_name, " instead of ", dtype_name(part.dtype)));
    } else {
      check_covered(*source, part, stored.directory());
      used.insert(source);
      result.sources.push_back(source);
      continue;
    }
    result.sources.push_back(nullptr);
  }
  for (const auto& [name, tensor] : by_name) {
    if (!known.contains(name) && !used.contains(tensor) && !name.ends_with("rotary_emb.inv_freq"))
      result.report.unexpected.push_back(name);
  }
  if (options.strict && !result.report.clean())
    throw ModelError(cat(stored.directory(), ": the files do not hold the state that is expected:",
                         result.report.text()));
  return result;
}

/// Elements [index, index + numel) of a stored rectangle, for one tensor of the state.
struct Range {
  const TensorPart* part;
  const StoredRectangle* rectangle;
  DType dtype;
  size_t file;
  int64_t file_at;
  int64_t index;
  int64_t numel;
  int64_t width() const { return static_cast<int64_t>(dtype_bytes(dtype)); }
  int64_t bytes() const { return numel * width(); }
};

class Loader {
 public:
  Loader(const StateDict& state, const std::vector<const StoredTensor*>& sources,
         const StoredTensors& stored, int64_t buffer_bytes)
      : stored_(stored), buffer_bytes_(std::max<int64_t>(buffer_bytes, 8)) {
    for (size_t i = 0; i < state.tensors.size(); ++i) {
      if (sources[i] != nullptr) plan(state.tensors[i], *sources[i]);
    }
    std::stable_sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) {
      return std::tuple(a.file, a.file_at) < std::tuple(b.file, b.file_at);
    });
  }

  /// Returns the bytes read.
  int64_t run() {
    int64_t total = 0;
    io::File file;
    size_t open = stored_.files().size();
    for (size_t first = 0; first < ranges_.size();) {
      const size_t last = run_end(first);
      const Range& range = ranges_[first];
      if (open != range.file) file = stored_.files()[range.file].open();
      open = range.file;
      if (is_direct(range)) {
        file.read_at(range.file_at, target_of(range));
        total += range.bytes();
        ++first;
        continue;
      }
      raw_.resize(static_cast<size_t>(ranges_[last - 1].file_at + ranges_[last - 1].bytes() -
                                      range.file_at));
      file.read_at(range.file_at, raw_);
      total += static_cast<int64_t>(raw_.size());
      const int64_t begin = range.file_at;
      for (; first < last; ++first)
        deliver(ranges_[first], raw_.data() + (ranges_[first].file_at - begin));
    }
    return total;
  }

 private:
  void plan(const TensorPart& part, const StoredTensor& source) {
    if (part.numel == 0) return;
    for (const StoredChunk& chunk : source.chunks) {
      const StoredRectangle& rectangle =
          rectangles_.emplace_back(part.shape, chunk.offsets, chunk.sizes);
      const int64_t begin = rectangle.count_before(part.at);
      const int64_t end = rectangle.count_before(part.at + part.numel);
      const auto width = static_cast<int64_t>(dtype_bytes(*source.dtype));
      const int64_t most = std::max<int64_t>(buffer_bytes_ / width, 1);
      for (int64_t at = begin; at < end; at += most) {
        ranges_.push_back({&part, &rectangle, *source.dtype, chunk.file, chunk.file_at + at * width,
                           at, std::min(most, end - at)});
      }
    }
  }

  /// End of the run that starts at `first`: adjacent bytes of one file and type, buffer_bytes
  /// together. (One type, so that every element is aligned in the buffer.)
  size_t run_end(size_t first) const {
    size_t last = first + 1;
    if (is_direct(ranges_[first])) return last;
    int64_t bytes = ranges_[first].bytes();
    for (; last < ranges_.size(); ++last) {
      const Range& before = ranges_[last - 1];
      const Range& next = ranges_[last];
      bytes += next.bytes();
      if (is_direct(next) || next.file != before.file || next.dtype != before.dtype ||
          bytes > buffer_bytes_ || next.file_at != before.file_at + before.bytes())
        break;
    }
    return last;
  }

  /// Is it read to where it belongs, without a buffer between? Not small ones, which are read
  /// together.
  static bool is_direct(const Range& range) {
    return !range.part->target.empty() && range.dtype == range.part->dtype &&
           range.bytes() >= kDirectBytes &&
           range.rectangle->run_at(range.index).numel >= range.numel;
  }

  static std::span<std::byte> target_of(const Range& range) {
    const int64_t at = range.rectangle->run_at(range.index).flat - range.part->at;
    return range.part->target.subspan(static_cast<size_t>(at * range.width()),
                                      static_cast<size_t>(range.bytes()));
  }

  void deliver(const Range& range, const std::byte* from) {
    const DType dtype = range.part->dtype;
    const auto width = static_cast<int64_t>(dtype_bytes(dtype));
    if (dtype != range.dtype) {
      converted_.resize(static_cast<size_t>(range.numel * width));
      convert_floats(from, range.dtype, converted_.data(), dtype, static_cast<size_t>(range.numel));
      from = converted_.data();
    }
    for (int64_t at = 0; at < range.numel;) {
      const StoredRectangle::Run run = range.rectangle->run_at(range.index + at);
      const int64_t numel = std::min(run.numel, range.numel - at);
      range.part->write(run.flat - range.part->at,
                        std::span(from + at * width, static_cast<size_t>(numel * width)));
      at += numel;
    }
  }

  const StoredTensors& stored_;
  int64_t buffer_bytes_;
  std::deque<StoredRectangle> rectangles_;  // Ranges point to them.
  std::vector<Range> ranges_;
  std::vector<std::byte> raw_, converted_;
};

}  // namespace

bool LoadReport::clean() const {
  return missing.empty() && unexpected.empty() && misshapen.empty() && wrong_type.empty();
}

std::string LoadReport::text() const {
  return listing("missing tensors", missing) + listing("unexpected tensors", unexpected) +
         listing("tensors of another shape", misshapen) +
         listing("tensors of another type", wrong_type);
}

LoadReport compare_state(const StateDict& state, const StoredTensors& stored,
                         const LoadOptions& options) {
  return match(state, stored, options).report;
}

LoadReport load_state(const StateDict& state, const StoredTensors& stored,
                      const LoadOptions& options) {
  Match matched = match(state, stored, options);
  matched.report.loaded_bytes = Loader(state, matched.sources, stored, options.buffer_bytes).run();
  return matched.report;
}

}  // namespace fsdp::checkpoint
