#include "libfsdp/io/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <set>

#include "libfsdp/base/checked.h"

namespace fsdp::io {
namespace {

constexpr int64_t kMaxValues = 16'000'000;
constexpr int64_t kMaxKeyBytes = 65'535;
constexpr int64_t kMaxAlignment = 1 << 20;
constexpr int kMaxArrayDepth = 4;
constexpr uint32_t kMaxDims = 4;

/// Reads a file from front to back through a small buffer, and knows how many bytes are left.
class Cursor {
 public:
  explicit Cursor(const File& file) : file_(file), file_bytes_(file.size()) {}

  int64_t position() const { return buffer_at_ + static_cast<int64_t>(used_); }
  int64_t remaining() const { return file_bytes_ - position(); }

  template <class T>
  T read() {
    T value;
    copy(std::as_writable_bytes(std::span(&value, 1)));
    return value;
  }

  /// A count of things that take at least `min_bytes` each.
  int64_t read_count(int64_t min_bytes, std::string_view what) {
    const auto count = read<uint64_t>();
    if (count > static_cast<uint64_t>(remaining() / min_bytes)) {
      throw ModelError(
          cat(what, " claims ", count, " entries, only ", remaining(), " bytes are left"));
    }
    return static_cast<int64_t>(count);
  }

  std::string read_string(int64_t max_bytes, std::string_view what) {
    const int64_t bytes = read_count(1, what);
    if (bytes > max_bytes)
      throw ModelError(cat(what, " has ", bytes, " bytes, expected at most ", max_bytes));
    std::string text(static_cast<size_t>(bytes), '\0');
    copy(std::as_writable_bytes(std::span(text.data(), text.size())));
    return text;
  }

 private:
  void copy(std::span<std::byte> out) {
    if (static_cast<int64_t>(out.size()) > remaining()) {
      throw ModelError(cat("the file ends within its header at offset ", file_bytes_,
                           ". Hint: it is truncated."));
    }
    while (!out.empty()) {
      if (used_ == buffer_.size()) fill();
      const size_t bytes = std::min(out.size(), buffer_.size() - used_);
      std::copy_n(buffer_.begin() + static_cast<std::ptrdiff_t>(used_), bytes, out.begin());
      used_ += bytes;
      out = out.subspan(bytes);
    }
  }

  void fill() {
    constexpr int64_t kBufferBytes = 1 << 16;
    buffer_at_ += static_cast<int64_t>(buffer_.size());
    used_ = 0;
    buffer_.resize(static_cast<size_t>(std::min(kBufferBytes, file_bytes_ - buffer_at_)));
    file_.read_at(buffer_at_, buffer_);
  }

  const File& file_;
  int64_t file_bytes_;
  int64_t buffer_at_ = 0;
  size_t used_ = 0;
  std::vector<std::byte> buffer_;
};

/// The double that a person would have written for this float: 1e-05, not 9.999999747378752e-06.
double shortest_double(float value) {
  if (!std::isfinite(value)) return value;
  std::array<char, 32> text;
  const char* end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  double result = 0;
  std::from_chars(text.data(), end, result);
  return result;
}

/// Reads metadata values; `num_values_` bounds what all arrays together may hold.
class ValueReader {
 public:
  explicit ValueReader(Cursor& cursor) : cursor_(cursor) {}

  Json read(uint32_t type, int depth = 0) {
    if (++num_values_ > kMaxValues) throw ModelError(cat("more than ", kMaxValues, " values"));
    switch (type) {
      case 0:
        return cursor_.read<uint8_t>();
      case 1:
        return cursor_.read<int8_t>();
      case 2:
        return cursor_.read<uint16_t>();
      case 3:
        return cursor_.read<int16_t>();
      case 4:
        return cursor_.read<uint32_t>();
      case 5:
        return cursor_.read<int32_t>();
      case 6:
        return shortest_double(cursor_.read<float>());
      case 7:
        return cursor_.read<uint8_t>() != 0;
      case 8:
        return cursor_.read_string(cursor_.remaining(), "a string");
      case 9:
        return read_array(depth);
      case 10:
        return cursor_.read<uint64_t>();
      case 11:
        return cursor_.read<int64_t>();
      case 12:
        return cursor_.read<double>();
      default:
        throw ModelError(cat("value type ", type, " is unknown"));
    }
  }

 private:
  Json read_array(int depth) {
    if (depth >= kMaxArrayDepth) throw ModelError(cat("arrays nest deeper than ", kMaxArrayDepth));
    const auto type = cursor_.read<uint32_t>();
    const int64_t count = cursor_.read_count(1, "an array");
    Json array = Json::array();
    for (int64_t i = 0; i < count; ++i) array.push_back(read(type, depth + 1));
    return array;
  }

  Cursor& cursor_;
  int64_t num_values_ = 0;
};

/// Runs `read`, with `what` before the message of an error.
template <class F>
auto named(std::string_view what, const std::string& name, F read) {
  try {
    return read();
  } catch (const ModelError& error) {
    throw ModelError(cat(what, " ", json_quote(name), ": ", error.what()));
  }
}

Json read_metadata(Cursor& cursor, int64_t count) {
  Json::Object members;
  std::set<std::string> keys;
  ValueReader values(cursor);
  for (int64_t i = 0; i < count; ++i) {
    std::string key = cursor.read_string(kMaxKeyBytes, "a key");
    if (!keys.insert(key).second) throw ModelError(cat("key ", json_quote(key), " occurs twice"));
    Json value = named("key", key, [&] { return values.read(cursor.read<uint32_t>()); });
    members.push_back({std::move(key), std::move(value)});
  }
  return Json(std::move(members));
}

/// One entry of the list of tensors; begin is still relative to the data.
GgufTensor read_tensor_info(Cursor& cursor, GgufTensor tensor, int64_t alignment) {
  const auto num_dims = cursor.read<uint32_t>();
  if (num_dims > kMaxDims)
    throw ModelError(cat(num_dims, " dimensions, expected at most ", kMaxDims));
  for (uint32_t i = 0; i < num_dims; ++i) {
    const auto dim = cursor.read<uint64_t>();
    if (!std::in_range<int64_t>(dim)) throw ModelError(cat("dimension ", dim, " is too large"));
    tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(dim));
    tensor.numel =
        checked_mul<ModelError>(tensor.numel, static_cast<int64_t>(dim), "elements of the tensor");
  }
  const GgufTypeInfo& info = gguf_type_info(cursor.read<uint32_t>());
  tensor.type = info.type;
  const int64_t row = tensor.shape.empty() ? 1 : tensor.shape.back();
  if (row % info.block_numel != 0) {
    throw ModelError(cat("rows of ", row, " elements do not fill blocks of ", info.block_numel,
                         " (", info.name, ")"));
  }
  tensor.bytes = checked_mul<ModelError>(tensor.numel / info.block_numel, info.block_bytes,
                                         "bytes of the tensor");
  const auto offset = cursor.read<uint64_t>();
  if (!std::in_range<int64_t>(offset) || static_cast<int64_t>(offset) % alignment != 0) {
    throw ModelError(cat("offset ", offset, " is not a multiple of the alignment ", alignment));
  }
  tensor.begin = static_cast<int64_t>(offset);
  return tensor;
}

int64_t alignment_of(const Json& metadata) {
  const auto alignment = metadata.get<int64_t>("general.alignment", 32);
  if (alignment >= 1 && alignment <= kMaxAlignment &&
      std::has_single_bit(static_cast<uint64_t>(alignment))) {
    return alignment;
  }
  throw ModelError(cat("'general.alignment': got ", alignment, ", expected a power of two up to ",
                       kMaxAlignment));
}

/// Moves offsets to the file's start; every tensor must lie within the file, none on another.
void place_tensors(std::vector<GgufTensor>& tensors, int64_t data_at, int64_t file_bytes) {
  std::vector<const GgufTensor*> order;
  for (GgufTensor& tensor : tensors) {
    tensor.begin = checked_add<ModelError>(tensor.begin, data_at, "offset of the tensor");
    const int64_t end = checked_add<ModelError>(tensor.begin, tensor.bytes, "end of the tensor");
    if (end > file_bytes) {
      throw ModelError(cat("tensor ", json_quote(tensor.name), " ends at offset ", end,
                           ", the file has ", file_bytes,
                           " bytes. Hint: the file is truncated; copy or download it again."));
    }
    order.push_back(&tensor);
  }
  std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->begin < b->begin; });
  for (size_t i = 1; i < order.size(); ++i) {
    if (order[i - 1]->begin + order[i - 1]->bytes <= order[i]->begin) continue;
    throw ModelError(cat("tensors ", json_quote(order[i - 1]->name), " and ",
                         json_quote(order[i]->name), " overlap"));
  }
}

}  // namespace

GgufFile GgufFile::open(const std::string& path) {
  GgufFile result;
  result.file_ = File::open_read(path);
  try {
    result.parse();
  } catch (const ModelError& error) {
    throw ModelError(cat(path, ": not a valid GGUF file: ", error.what()));
  }
  return result;
}

void GgufFile::parse() {
  constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
  constexpr int64_t kMinTensorInfoBytes = 8 + 4 + 4 + 8, kMinKeyBytes = 8 + 4 + 1;
  Cursor cursor(file_);
  if (cursor.read<uint32_t>() != kMagic) throw ModelError("it does not begin with GGUF");
  const auto version = cursor.read<uint32_t>();
  if (version != 2 && version != 3) {
    throw ModelError(cat("version ", version, " is not supported, expected 2 or 3, little-endian"));
  }
  const int64_t num_tensors = cursor.read_count(kMinTensorInfoBytes, "the list of tensors");
  const int64_t num_keys = cursor.read_count(kMinKeyBytes, "the metadata");
  metadata_ = read_metadata(cursor, num_keys);
  const int64_t alignment = alignment_of(metadata_);
  for (int64_t i = 0; i < num_tensors; ++i) {
    GgufTensor tensor{.name = cursor.read_string(kMaxKeyBytes, "a tensor's name")};
    const std::string name = tensor.name;
    if (!by_name_.emplace(name, tensors_.size()).second) {
      throw ModelError(cat("tensor ", json_quote(name), " occurs twice"));
    }
    tensors_.push_back(named(
        "tensor", name, [&] { return read_tensor_info(cursor, std::move(tensor), alignment); }));
  }
  place_tensors(tensors_, round_up(cursor.position(), alignment), file_.size());
}

const GgufTensor* GgufFile::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

void GgufFile::read(const GgufTensor& tensor, int64_t at, std::span<float> out) const {
  const auto end = at + static_cast<int64_t>(out.size());
  check(at >= 0 && end <= tensor.numel, "read outside a GGUF tensor");
  const GgufTypeInfo& info = gguf_type_info(static_cast<uint32_t>(tensor.type));
  const int64_t blocks_at_once = (int64_t{1} << 20) / info.block_bytes;
  const int64_t end_block = (end + info.block_numel - 1) / info.block_numel;
  std::vector<std::byte> raw;
  std::vector<float> values;
  for (int64_t block = at / info.block_numel; block < end_block; block += blocks_at_once) {
    const int64_t count = std::min(blocks_at_once, end_block - block);
    raw.resize(static_cast<size_t>(count * info.block_bytes));
    values.resize(static_cast<size_t>(count * info.block_numel));
    file_.read_at(tensor.begin + block * info.block_bytes, raw);
    gguf_decode(tensor.type, raw, values);
    const int64_t values_at = block * info.block_numel;  // Element of the tensor at values[0].
    const int64_t from = std::max(at, values_at);
    const int64_t to = std::min(end, values_at + count * info.block_numel);
    std::copy(values.begin() + (from - values_at), values.begin() + (to - values_at),
              out.begin() + (from - at));
  }
}

}  // namespace fsdp::io
