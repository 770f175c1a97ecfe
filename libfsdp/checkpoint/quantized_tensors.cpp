#include "libfsdp/checkpoint/quantized_tensors.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"
#include "libfsdp/kernels/quantized_weight.h"

namespace fsdp::checkpoint {
namespace {

constexpr std::string_view kStateMark = ".quant_state.bitsandbytes__";
constexpr std::array<int64_t, 8> kBlockSizes = {32, 64, 128, 256, 512, 1024, 2048, 4096};
constexpr int64_t kMaxStateBytes = 1 << 16;

int64_t numel_of(std::span<const int64_t> shape) {
  int64_t numel = 1;
  for (const int64_t dim : shape)
    numel = checked_mul<ModelError>(numel, dim, "elements of a quantised weight");
  return numel;
}

std::string shape_list(std::span<const int64_t> shape) {
  std::string text;
  for (const int64_t dim : shape) text += cat(text.empty() ? "" : ", ", dim);
  return cat("[", text, "]");
}

/// As Python's repr().
std::string python_float(double value) {
  char buffer[40];
  const auto end =
      std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific);
  const std::string text(buffer, end.ptr);
  const int exponent = std::stoi(text.substr(text.find('e') + 1));
  if (exponent < -4 || exponent >= 16) return text;
  const auto fixed = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::fixed);
  const std::string plain(buffer, fixed.ptr);
  return plain.find('.') == std::string::npos ? plain + ".0" : plain;
}

/// Looks at the parts of one weight; every message starts with the directory and the weight.
class PartsOf {
 public:
  PartsOf(StoredReader& reader, std::string weight) : reader_(reader), weight_(std::move(weight)) {}

  [[noreturn]] void fail(const std::string& text) const {
    throw ModelError(
        cat(reader_.stored().directory(), ": quantised weight '", weight_, "': ", text));
  }
  const StoredTensor& part(const std::string& name) const {
    const StoredTensor* const found = reader_.stored().find(name);
    if (found == nullptr) fail(cat("tensor '", name, "' is missing"));
    if (uncovered_range(*found, found->shape)) fail(cat("parts of '", name, "' are missing"));
    return *found;
  }
  const StoredTensor& part(const std::string& name, DType dtype,
                           const std::vector<int64_t>& shape) const {
    const StoredTensor& found = part(name);
    if (found.dtype != dtype || found.shape != shape)
      fail(cat("'", name, "' is ", found.dtype_name, " ", io::shape_text(found.shape),
               "; expected ", io::safetensors_dtype_name(dtype), " ", io::shape_text(shape)));
    return found;
  }
  std::vector<std::byte> read(const StoredTensor& tensor) const {
    std::vector<std::byte> bytes(static_cast<size_t>(numel_of(tensor.shape)) *
                                 dtype_bytes(*tensor.dtype));
    reader_.read(tensor, 0, bytes);
    return bytes;
  }
  /// A table must have our bits: the codes mean what it says.
  void check_table(const std::string& name, const float* expected, int64_t size) const {
    const auto bytes = read(part(name, DType::kF32, {size}));
    for (int64_t i = 0; i < size; ++i) {
      float value;
      std::memcpy(&value, bytes.data() + i * 4, 4);
      if (value != expected[i])
        fail(cat("entry ", i, " of '", name, "' is ", value, "; expected ", expected[i]));
    }
  }
  bool has(const std::string& name) const { return reader_.stored().find(name) != nullptr; }

 private:
  StoredReader& reader_;
  std::string weight_;
};

io::Json read_state(const PartsOf& parts, const std::string& name) {
  const StoredTensor& tensor = parts.part(name);
  if (tensor.dtype != DType::kU8 || tensor.shape.size() != 1 || tensor.shape[0] > kMaxStateBytes)
    parts.fail(cat("'", name, "' is ", tensor.dtype_name, " ", io::shape_text(tensor.shape),
                   "; expected U8 [n], the bytes of a JSON document"));
  const auto bytes = parts.read(tensor);
  return io::Json::parse({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, name);
}

DType float_dtype(const io::Json& state, const char* key) {
  const auto name = state.get<std::string>(key);
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  throw io::JsonError(cat("'", key, "' is '", name, "'; expected float32, bfloat16 or float16"));
}

/// What the JSON says of the weight.
void parse_state(const io::Json& state, QuantizedWeight& weight) {
  constexpr std::array<std::string_view, 7> kKeys = {
      "quant_type",       "blocksize",    "dtype",        "shape",
      "nested_blocksize", "nested_dtype", "nested_offset"};
  for (const auto& member : state.items()) {
    if (std::find(kKeys.begin(), kKeys.end(), member.key) == kKeys.end())
      throw io::JsonError(cat("unknown member '", member.key, "'"));
  }
  const auto type = state.get<std::string>("quant_type");
  if (type != io::quant_kind_name(weight.kind))
    throw io::JsonError(
        cat("'quant_type' is '", type, "'; its name says ", io::quant_kind_name(weight.kind)));
  weight.blocksize = state.get<int64_t>("blocksize");
  if (std::find(kBlockSizes.begin(), kBlockSizes.end(), weight.blocksize) == kBlockSizes.end())
    throw io::JsonError(
        cat("'blocksize' is ", weight.blocksize, "; expected 32, 64, 128, ... or 4096"));
  weight.dtype = float_dtype(state, "dtype");
  weight.shape = state.get<std::vector<int64_t>>("shape");
  for (const int64_t dim : weight.shape) {
    if (dim < 0) throw io::JsonError(cat("'shape' has the size ", dim));
  }
  weight.numel = numel_of(weight.shape);
  weight.double_quant = state.contains("nested_offset");
  if (!weight.double_quant) return;
  if (const auto size = state.get<int64_t>("nested_blocksize"); size != kernels::kAbsmaxBlock)
    throw io::JsonError(cat("'nested_blocksize' is ", size, "; expected 256"));
  if (float_dtype(state, "nested_dtype") != DType::kF32)
    throw io::JsonError("'nested_dtype' is not float32");
  weight.offset = static_cast<float>(state.get<double>("nested_offset"));
  if (!std::isfinite(weight.offset)) throw io::JsonError("'nested_offset' is not finite");
}

void check_four_bit_parts(const PartsOf& parts, QuantizedWeight& weight) {
  const StoredTensor& codes = parts.part(weight.name);
  const bool is_storage = codes.dtype && *codes.dtype != DType::kBool;
  const int64_t width = is_storage ? static_cast<int64_t>(dtype_bytes(*codes.dtype)) : 1;
  const int64_t bytes = weight.code_bytes(weight.numel);
  if (!is_storage || bytes % width != 0 || codes.shape != std::vector<int64_t>{bytes / width, 1})
    parts.fail(cat("its codes are ", codes.dtype_name, " ", io::shape_text(codes.shape),
                   "; expected U8 [", bytes, ", 1] (of shape ", io::shape_text(weight.shape),
                   ") or the same bytes as another type"));
  weight.storage = *codes.dtype;
  const std::string& name = weight.name;
  const int64_t scales = weight.num_scales();
  parts.part(name + ".absmax", weight.double_quant ? DType::kU8 : DType::kF32, {scales});
  parts.check_table(name + ".quant_map", kernels::four_bit_table(weight.code()).values, 16);
  for (const char* suffix : {".nested_absmax", ".nested_quant_map"}) {
    if (!weight.double_quant && parts.has(name + suffix))
      parts.fail(cat("has '", name, suffix, "', but its state has no 'nested_offset'"));
  }
  if (!weight.double_quant) return;
  const int64_t nested = (scales + kernels::kAbsmaxBlock - 1) / kernels::kAbsmaxBlock;
  parts.part(name + ".nested_absmax", DType::kF32, {nested});
  parts.check_table(name + ".nested_quant_map", kernels::signed_dynamic_map().values, 256);
}

QuantizedWeight four_bit_weight(StoredReader& reader, const std::string& state_name, size_t mark) {
  QuantizedWeight weight{.name = state_name.substr(0, mark)};
  const PartsOf parts(reader, weight.name);
  const std::string type = state_name.substr(mark + kStateMark.size());
  if (type != "nf4" && type != "fp4")
    parts.fail(cat("'", state_name, "': unknown type; expected nf4 or fp4"));
  weight.kind = type == "nf4" ? io::QuantKind::kNf4 : io::QuantKind::kFp4;
  const io::Json state = read_state(parts, state_name);
  try {
    parse_state(state, weight);
  } catch (const io::JsonError& error) {
    parts.fail(cat("'", state_name, "': ", error.what()));
  }
  check_four_bit_parts(parts, weight);
  return weight;
}

QuantizedWeight int8_weight(StoredReader& reader, const std::string& module) {
  QuantizedWeight weight{.name = module + ".weight",
                         .kind = io::QuantKind::kInt8,
                         .dtype = DType::kF32,
                         .storage = DType::kI8};
  const PartsOf parts(reader, weight.name);
  const StoredTensor& codes = parts.part(weight.name);
  if (codes.dtype != DType::kI8 || codes.shape.size() != 2 || codes.shape[1] == 0)
    parts.fail(cat("has '", module, ".SCB', but is ", codes.dtype_name, " ",
                   io::shape_text(codes.shape), "; expected I8 [rows, columns]"));
  weight.shape = codes.shape;
  weight.numel = numel_of(codes.shape);
  weight.blocksize = codes.shape[1];
  parts.part(module + ".SCB", DType::kF32, {codes.shape[0]});
  if (const std::string format = module + ".weight_format"; parts.has(format)) {
    const auto bytes = parts.read(parts.part(format, DType::kU8, {}));
    if (bytes[0] != std::byte{0})
      parts.fail(cat("'", format, "' is ", static_cast<int>(bytes[0]),
                     "; expected 0 (rows). Hint: an old version of bitsandbytes wrote it; save it "
                     "again with a new one"));
  }
  return weight;
}

}  // namespace

std::string QuantizedWeight::scales_name() const {
  if (!is_int8()) return name + ".absmax";
  return name.substr(0, name.size() - std::string_view("weight").size()) + "SCB";
}

QuantizedWeights find_quantized_weights(StoredReader& reader) {
  constexpr std::string_view kInt8Mark = ".SCB";
  QuantizedWeights weights;
  for (const auto& [name, tensor] : reader.stored().tensors()) {
    QuantizedWeight weight;
    if (const size_t mark = name.rfind(kStateMark); mark != std::string::npos) {
      weight = four_bit_weight(reader, name, mark);
    } else if (name.ends_with(kInt8Mark)) {
      weight = int8_weight(reader, name.substr(0, name.size() - kInt8Mark.size()));
    } else {
      continue;
    }
    const std::string weight_name = weight.name;
    if (!weights.emplace(weight_name, std::move(weight)).second)
      PartsOf(reader, weight_name).fail("it is quantised in two ways");
  }
  return weights;
}

std::vector<std::string> quantized_part_names(const QuantizedWeight& weight) {
  const std::string& name = weight.name;
  if (weight.is_int8()) return {weight.scales_name(), name + "_format"};
  std::vector<std::string> names = {name + ".absmax", name + ".quant_map",
                                    cat(name, kStateMark, io::quant_kind_name(weight.kind))};
  if (weight.double_quant) {
    names.push_back(name + ".nested_absmax");
    names.push_back(name + ".nested_quant_map");
  }
  return names;
}

std::string quant_state_text(const QuantizedWeight& weight, float offset) {
  std::string nested;
  if (weight.double_quant)
    nested = cat(", \"nested_blocksize\": ", kernels::kAbsmaxBlock,
                 ", \"nested_dtype\": \"float32\", \"nested_offset\": ",
                 python_float(static_cast<double>(offset)));
  return cat("{\"quant_type\": \"", io::quant_kind_name(weight.kind),
             "\", \"blocksize\": ", weight.blocksize, ", \"dtype\": \"", dtype_name(weight.dtype),
             "\", \"shape\": ", shape_list(weight.shape), nested, "}");
}

}  // namespace fsdp::checkpoint
