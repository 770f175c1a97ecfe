#include "libfsdp/io/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <numeric>
#include <set>

#include "libfsdp/base/checked.h"
#include "libfsdp/io/json.h"

namespace fsdp::io {
namespace {

static_assert(std::endian::native == std::endian::little, "file formats here are little-endian");

constexpr int64_t kLengthBytes = 8;
constexpr int64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kMaxDims = 64;

struct ElementType {
  std::string_view name;
  int bits;
  std::optional<DType> dtype;
};
// The order is the format's: writers sort by it, descending.
constexpr std::array<ElementType, 22> kElementTypes = {{{"BOOL", 8, DType::kBool},
                                                        {"F4", 4, {}},
                                                        {"F6_E2M3", 6, {}},
                                                        {"F6_E3M2", 6, {}},
                                                        {"U8", 8, DType::kU8},
                                                        {"I8", 8, DType::kI8},
                                                        {"F8_E5M2", 8, {}},
                                                        {"F8_E4M3", 8, {}},
                                                        {"F8_E8M0", 8, {}},
                                                        {"F8_E4M3FNUZ", 8, {}},
                                                        {"F8_E5M2FNUZ", 8, {}},
                                                        {"I16", 16, DType::kI16},
                                                        {"U16", 16, {}},
                                                        {"F16", 16, DType::kF16},
                                                        {"BF16", 16, DType::kBF16},
                                                        {"I32", 32, DType::kI32},
                                                        {"U32", 32, {}},
                                                        {"F32", 32, DType::kF32},
                                                        {"C64", 64, {}},
                                                        {"F64", 64, DType::kF64},
                                                        {"I64", 64, DType::kI64},
                                                        {"U64", 64, {}}}};

size_t rank_of_type(DType dtype) {
  for (size_t i = 0; i < kElementTypes.size(); ++i) {
    if (kElementTypes[i].dtype == dtype) return i;
  }
  throw InternalError(cat("safetensors has no type for ", dtype_name(dtype)));
}

const ElementType& element_type(const std::string& name) {
  for (const ElementType& type : kElementTypes) {
    if (type.name == name) return type;
  }
  throw ModelError(cat("unknown dtype '", name, "'"));
}

/// Product of the dimensions; every prefix is checked, so a later 0 does not hide an overflow.
template <class E>
int64_t checked_numel(std::span<const int64_t> shape) {
  int64_t numel = 1;
  for (const int64_t dim : shape) {
    if (dim < 0) throw E(cat("shape ", shape_text(shape), " has a negative dimension"));
    numel = checked_mul<E>(numel, dim, "elements of the shape");
  }
  return numel;
}

/// Reads one entry; begin is still relative to the end of the header.
TensorEntry parse_entry(const std::string& name, const Json& json) {
  TensorEntry entry{.name = name, .dtype_name = json.get<std::string>("dtype")};
  if (name.find('\0') != std::string::npos) throw ModelError("the name holds a NUL character");
  const ElementType& type = element_type(entry.dtype_name);
  entry.dtype = type.dtype;
  entry.shape = json.get<std::vector<int64_t>>("shape");
  if (entry.shape.size() > kMaxDims) {
    throw ModelError(cat(entry.shape.size(), " dimensions, expected at most ", kMaxDims));
  }
  entry.numel = checked_numel<ModelError>(entry.shape);
  const auto offsets = json.get<std::vector<int64_t>>("data_offsets");
  if (offsets.size() != 2 || offsets[0] < 0 || offsets[1] < offsets[0]) {
    throw ModelError("data_offsets must be [begin, end] with 0 <= begin <= end");
  }
  entry.begin = offsets[0];
  entry.bytes = offsets[1] - offsets[0];
  const int64_t bits = checked_mul<ModelError>(entry.numel, type.bits, "bits of the tensor");
  if (bits % 8 != 0) throw ModelError(cat(bits, " bits do not fill whole bytes"));
  if (bits / 8 != entry.bytes) {
    throw ModelError(cat("shape ", shape_text(entry.shape), " of ", entry.dtype_name, " takes ",
                         bits / 8, " bytes, data_offsets give ", entry.bytes));
  }
  return entry;
}

std::string read_header(const File& file, int64_t file_bytes) {
  if (file_bytes < kLengthBytes) {
    throw ModelError(cat("the file has ", file_bytes, " bytes, a header needs at least 8"));
  }
  uint64_t length;
  file.read_at(0, std::as_writable_bytes(std::span(&length, 1)));
  if (length > static_cast<uint64_t>(kMaxHeaderBytes)) {
    throw ModelError(cat("the header claims ", length, " bytes, the limit is ", kMaxHeaderBytes,
                         ". Hint: is this a safetensors file?"));
  }
  if (kLengthBytes + static_cast<int64_t>(length) > file_bytes) {
    throw ModelError(cat("the header claims ", length, " bytes, the file has only ", file_bytes,
                         ". Hint: the file is truncated; copy or download it again."));
  }
  std::string header(length, '\0');
  file.read_at(kLengthBytes, std::as_writable_bytes(std::span(header.data(), header.size())));
  return header;
}

std::map<std::string, std::string> parse_metadata(const Json& json) {
  std::map<std::string, std::string> metadata;
  if (json.is_null()) return metadata;
  for (const auto& [key, value] : json.items()) metadata[key] = value.as_string();
  return metadata;
}

/// Data must lie end to end from the header to the end of the file: no holes, overlaps or trailing
/// bytes.
void check_contiguous(const std::vector<TensorEntry>& entries, int64_t data_at,
                      int64_t file_bytes) {
  int64_t expected = data_at;
  for (const TensorEntry& entry : entries) {
    if (entry.begin != expected) {
      throw ModelError(cat("tensor '", entry.name, "' begins at offset ", entry.begin,
                           ", expected ", expected, ": data must be contiguous"));
    }
    expected = checked_add<ModelError>(entry.begin, entry.bytes, "end of the tensor");
  }
  if (expected != file_bytes) {
    throw ModelError(cat("the tensors end at offset ", expected, ", the file has ", file_bytes,
                         " bytes. Hint: the file is ",
                         expected > file_bytes ? "truncated; copy or download it again."
                                               : "followed by bytes that belong to no tensor."));
  }
}

/// Indices of the specs in the order of their data: widest type first, then by name.
std::vector<size_t> data_order(std::span<const TensorSpec> specs) {
  std::set<std::string_view> names;
  for (const TensorSpec& spec : specs) {
    if (names.insert(spec.name).second) continue;
    throw ConfigError(cat("tensor '", spec.name, "' is to be written twice"));
  }
  std::vector<size_t> order(specs.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const size_t type_a = rank_of_type(specs[a].dtype), type_b = rank_of_type(specs[b].dtype);
    return type_a != type_b ? type_a > type_b : specs[a].name < specs[b].name;
  });
  return order;
}

/// The entry of a spec whose data begins at `begin` after the header.
TensorEntry planned_entry(const TensorSpec& spec, int64_t begin) {
  TensorEntry entry{.name = spec.name,
                    .dtype_name = std::string(safetensors_dtype_name(spec.dtype)),
                    .dtype = spec.dtype,
                    .shape = spec.shape,
                    .begin = begin};
  entry.numel = checked_numel<ConfigError>(spec.shape);
  const auto width = static_cast<int64_t>(dtype_bytes(spec.dtype));
  entry.bytes = checked_mul<ConfigError>(entry.numel, width, "bytes of the tensor");
  return entry;
}

std::string header_member(const TensorEntry& entry) {
  const Json value =
      Json::object({{"dtype", entry.dtype_name},
                    {"shape", entry.shape},
                    {"data_offsets", Json::array({entry.begin, entry.begin + entry.bytes})}});
  return json_quote(entry.name) + ":" + value.dump();
}

}  // namespace

std::string_view safetensors_dtype_name(DType dtype) {
  return kElementTypes[rank_of_type(dtype)].name;
}

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += cat(i == 0 ? "" : ", ", shape[i]);
  return text + "]";
}

SafetensorsFile SafetensorsFile::open(const std::string& path) {
  SafetensorsFile result;
  result.file_ = File::open_read(path);
  try {
    result.parse();
  } catch (const ModelError& error) {
    throw ModelError(cat(path, ": not a valid safetensors file: ", error.what()));
  }
  return result;
}

void SafetensorsFile::parse() {
  const int64_t file_bytes = file_.size();
  const std::string header = read_header(file_, file_bytes);
  const auto data_at = kLengthBytes + static_cast<int64_t>(header.size());
  const Json json = Json::parse(header, "header", {.max_depth = 4, .max_values = 8'000'000});
  for (const auto& [name, value] : json.items()) {
    try {
      if (name == "__metadata__") {
        metadata_ = parse_metadata(value);
        continue;
      }
      TensorEntry entry = parse_entry(name, value);
      entry.begin = checked_add<ModelError>(entry.begin, data_at, "offset of the tensor");
      entries_.push_back(std::move(entry));
    } catch (const ModelError& error) {
      throw ModelError(cat(json_quote(name), ": ", error.what()));
    }
  }
  std::sort(entries_.begin(), entries_.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::pair(a.begin, a.bytes) < std::pair(b.begin, b.bytes);
  });
  check_contiguous(entries_, data_at, file_bytes);
  for (size_t i = 0; i < entries_.size(); ++i) by_name_.emplace(entries_[i].name, i);
}

const TensorEntry* SafetensorsFile::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &entries_[found->second];
}

void SafetensorsFile::read(const TensorEntry& entry, int64_t byte_offset,
                           std::span<std::byte> out) const {
  const auto bytes = static_cast<int64_t>(out.size());
  check(byte_offset >= 0 && byte_offset <= entry.bytes && bytes <= entry.bytes - byte_offset,
        "read outside a tensor");
  file_.read_at(entry.begin + byte_offset, out);
  if (entry.dtype == DType::kBool) {
    const bool valid =
        std::all_of(out.begin(), out.end(), [](std::byte b) { return b <= std::byte{1}; });
    if (!valid) throw ModelError(cat(path(), ": '", entry.name, "': a BOOL is neither 0 nor 1"));
  }
}

SafetensorsLayout SafetensorsLayout::plan(std::span<const TensorSpec> specs,
                                          const std::map<std::string, std::string>& metadata) {
  SafetensorsLayout layout;
  layout.entries.resize(specs.size());
  std::string text = "{";
  if (!metadata.empty()) {
    Json pairs;
    for (const auto& [key, value] : metadata) pairs[key] = value;
    text += "\"__metadata__\":" + pairs.dump();
  }
  int64_t end = 0;
  for (const size_t i : data_order(specs)) {
    TensorEntry& entry = layout.entries[i];
    entry = planned_entry(specs[i], end);
    end = checked_add<ConfigError>(end, entry.bytes, "bytes of the file");
    text += (text.size() > 1 ? "," : "") + header_member(entry);
  }
  text += '}';
  text.resize(static_cast<size_t>(round_up(static_cast<int64_t>(text.size()), 8)), ' ');

  const uint64_t length = text.size();
  layout.header.resize(kLengthBytes);
  std::memcpy(layout.header.data(), &length, kLengthBytes);
  layout.header += text;
  const auto data_at = static_cast<int64_t>(layout.header.size());
  for (TensorEntry& entry : layout.entries) entry.begin += data_at;
  layout.file_bytes = checked_add<ConfigError>(end, data_at, "bytes of the file");
  return layout;
}

void write_safetensors(const std::string& path, std::span<const TensorSpec> specs,
                       std::span<const std::span<const std::byte>> data,
                       const std::map<std::string, std::string>& metadata) {
  check(data.size() == specs.size(), "write_safetensors: one span of data for each tensor");
  const SafetensorsLayout layout = SafetensorsLayout::plan(specs, metadata);
  AtomicFile out(path);
  out.file().allocate(layout.file_bytes);
  out.file().write_at(0, std::as_bytes(std::span(layout.header.data(), layout.header.size())));
  for (size_t i = 0; i < data.size(); ++i) {
    check(static_cast<int64_t>(data[i].size()) == layout.entries[i].bytes,
          "write_safetensors: data of another size than the shape says");
    out.file().write_at(layout.entries[i].begin, data[i]);
  }
  out.commit();
}

}  // namespace fsdp::io
