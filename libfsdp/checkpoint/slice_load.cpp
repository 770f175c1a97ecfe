#include <algorithm>
#include <optional>
#include <set>
#include <tuple>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/slice_io.h"

namespace fsdp::checkpoint {
namespace {

bool is_floating(std::optional<DType> dtype) {
  return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16 ||
         dtype == DType::kF64;
}

/// "3 missing tensors: a, b, c" on a line of its own; at most a few names.
std::string listing(std::string_view what, const std::vector<std::string>& names) {
  constexpr size_t kMaxShown = 5;
  if (names.empty()) return "";
  std::string text = cat("\n  ", names.size(), " ", what, ": ");
  for (size_t i = 0; i < std::min(names.size(), kMaxShown); ++i)
    text += cat(i ? ", " : "", names[i]);
  if (names.size() > kMaxShown) text += cat(", and ", names.size() - kMaxShown, " more");
  return text;
}

/// A slice, or a part of one, as bytes of a file.
struct Range {
  const TensorSlice* slice;
  const io::SafetensorsFile* file;
  DType dtype;
  int64_t slice_at;  // First element within the slice.
  int64_t numel;
  int64_t file_at;
  int64_t width() const { return static_cast<int64_t>(dtype_bytes(dtype)); }
  int64_t bytes() const { return numel * width(); }
};

Range locate(const io::HfWeights& weights, const TensorSlice& slice) {
  const auto found = weights.find(slice.name);
  if (!found)
    throw ModelError(
        cat(weights.directory(), ": tensor '", slice.name, "' is not in the model's files"));
  const io::TensorEntry& entry = *found->entry;
  if (!is_floating(entry.dtype)) {
    throw ModelError(cat(found->file->path(), ": '", slice.name, "' is ", entry.dtype_name,
                         ", expected a floating type (F32, BF16, F16, F64)"));
  }
  check(slice.param_at >= 0 && slice.numel >= 0 && slice.param_at <= entry.numel &&
            slice.numel <= entry.numel - slice.param_at,
        cat("slice of '", slice.name, "' lies outside the tensor"));
  Range range{&slice, found->file, *entry.dtype, 0, slice.numel, 0};
  range.file_at = entry.begin + slice.param_at * range.width();
  return range;
}

/// The ranges in order of the files, none larger than chunk_bytes.
std::vector<Range> ordered_ranges(const io::HfWeights& weights, std::span<const TensorSlice> slices,
                                  int64_t chunk_bytes) {
  std::vector<Range> ranges;
  for (const TensorSlice& slice : slices) {
    const Range whole = locate(weights, slice);
    const int64_t most = std::max<int64_t>(chunk_bytes / whole.width(), 1);
    for (int64_t at = 0; at < slice.numel; at += most) {
      Range part = whole;
      part.slice_at = at;
      part.numel = std::min(most, slice.numel - at);
      part.file_at += at * part.width();
      ranges.push_back(part);
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return std::tuple(a.file, a.file_at) < std::tuple(b.file, b.file_at);
  });
  return ranges;
}

/// End of the run that starts at `first`: adjacent bytes of one file and type, chunk_bytes
/// together. (One type, so that every element is aligned in the buffer.)
size_t run_end(const std::vector<Range>& ranges, size_t first, int64_t chunk_bytes) {
  size_t last = first + 1;
  int64_t bytes = ranges[first].bytes();
  for (; last < ranges.size(); ++last) {
    const Range& before = ranges[last - 1];
    const Range& next = ranges[last];
    const bool adjacent = next.file == before.file && next.dtype == before.dtype &&
                          next.file_at == before.file_at + before.bytes();
    bytes += next.bytes();
    if (!adjacent || bytes > chunk_bytes) break;
  }
  return last;
}

}  // namespace

void check_names(const io::HfWeights& weights, std::span<const io::NamedShape> expected,
                 std::span<const std::string> tied_aliases) {
  std::vector<std::string> missing, unexpected, misshapen, not_floating;
  std::set<std::string_view> known(tied_aliases.begin(), tied_aliases.end());
  for (const io::NamedShape& tensor : expected) {
    known.insert(tensor.name);
    const auto found = weights.find(tensor.name);
    if (!found) {
      missing.push_back(tensor.name);
    } else if (found->entry->shape != tensor.shape) {
      misshapen.push_back(cat(tensor.name, " ", io::shape_text(found->entry->shape), " instead of ",
                              io::shape_text(tensor.shape)));
    } else if (!is_floating(found->entry->dtype)) {
      not_floating.push_back(cat(tensor.name, " ", found->entry->dtype_name));
    }
  }
  for (const std::string& name : weights.names()) {
    if (!known.contains(name) && !name.ends_with("rotary_emb.inv_freq")) unexpected.push_back(name);
  }
  const std::string problems = listing("missing tensors", missing) +
                               listing("unexpected tensors", unexpected) +
                               listing("tensors of another shape", misshapen) +
                               listing("tensors that are not of a floating type", not_floating);
  if (problems.empty()) return;
  throw ModelError(cat(weights.directory(),
                       ": the weights do not fit the model that config.json describes:", problems));
}

void load_slices(const io::HfWeights& weights, std::span<const TensorSlice> slices,
                 const SliceSink& sink, int64_t chunk_bytes) {
  const std::vector<Range> ranges = ordered_ranges(weights, slices, chunk_bytes);
  std::vector<std::byte> raw;
  std::vector<float> values;
  for (size_t first = 0; first < ranges.size();) {
    const size_t last = run_end(ranges, first, chunk_bytes);
    const DType dtype = ranges[first].dtype;
    const int64_t begin = ranges[first].file_at;
    raw.resize(static_cast<size_t>(ranges[last - 1].file_at + ranges[last - 1].bytes() - begin));
    values.resize(raw.size() / dtype_bytes(dtype));
    ranges[first].file->file().read_at(begin, raw);
    convert_floats(raw.data(), dtype, values.data(), DType::kF32, values.size());
    const float* at = values.data();
    for (; first < last; ++first) {
      const auto numel = static_cast<size_t>(ranges[first].numel);
      sink(*ranges[first].slice, ranges[first].slice_at, std::span(at, numel));
      at += numel;
    }
  }
}

}  // namespace fsdp::checkpoint
