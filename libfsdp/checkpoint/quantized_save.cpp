#include <algorithm>
#include <cstring>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/convert_state.h"
#include "libfsdp/checkpoint/quantized_reader.h"
#include "libfsdp/kernels/quantized_weight.h"

namespace fsdp::checkpoint {
namespace {

using Reader = std::shared_ptr<QuantizedReader>;

/// A part whose bytes exist already.
TensorPart known_part(std::string name, DType dtype, std::vector<int64_t> shape, const void* data,
                      size_t bytes) {
  const auto* const begin = static_cast<const std::byte*>(data);
  TensorPart part{.name = std::move(name), .dtype = dtype, .shape = std::move(shape)};
  part.numel = static_cast<int64_t>(bytes / dtype_bytes(dtype));
  part.read = [values = std::vector<std::byte>(begin, begin + bytes), width = dtype_bytes(dtype)](
                  int64_t offset, std::span<std::byte> to) {
    std::memcpy(to.data(), values.data() + static_cast<size_t>(offset) * width, to.size());
  };
  return part;
}

/// Bytes [at, at + to.size()) of a weight's codes, which may begin and end within a block.
void read_code_bytes(QuantizedReader& reader, const QuantizedWeight& weight, int64_t at,
                     std::span<std::byte> to) {
  const auto size = static_cast<int64_t>(to.size());
  if (weight.is_int8()) return reader.read(weight, at, at + size, to, {});
  const int64_t block = weight.blocksize;
  const int64_t begin = 2 * at / block * block;
  const int64_t end = std::min(weight.numel, (2 * (at + size) + block - 1) / block * block);
  std::vector<std::byte> whole(static_cast<size_t>(weight.code_bytes(end - begin)));
  reader.read(weight, begin, end, whole, {});
  std::memcpy(to.data(), whole.data() + (at - begin / 2), to.size());
}

TensorPart codes_part(const Reader& reader, const QuantizedWeight& weight) {
  const auto width = static_cast<int64_t>(dtype_bytes(weight.storage));
  TensorPart part{.name = weight.name, .dtype = weight.storage};
  part.numel = weight.code_bytes(weight.numel) / width;
  part.shape = weight.is_int8() ? weight.shape : std::vector<int64_t>{part.numel, 1};
  part.read = [reader, &weight, width](int64_t offset, std::span<std::byte> to) {
    read_code_bytes(*reader, weight, offset * width, to);
  };
  return part;
}

TensorPart scales_part(const Reader& reader, const QuantizedWeight& weight) {
  TensorPart part{.name = weight.scales_name(),
                  .dtype = weight.double_quant ? DType::kU8 : DType::kF32,
                  .shape = {weight.num_scales()},
                  .numel = weight.num_scales()};
  part.read = [reader, &weight](int64_t offset, std::span<std::byte> to) {
    if (weight.double_quant) {
      std::memcpy(to.data(), reader->nested_scales(weight).codes.data() + offset, to.size());
      return;
    }
    const auto n = static_cast<int64_t>(to.size() / sizeof(float));
    std::vector<float> scales(static_cast<size_t>(n));
    const int64_t end = std::min(weight.numel, (offset + n) * weight.blocksize);
    reader->read(weight, offset * weight.blocksize, end, {}, scales);
    std::memcpy(to.data(), scales.data(), to.size());
  };
  return part;
}

TensorPart nested_part(const Reader& reader, const QuantizedWeight& weight) {
  const int64_t n = (weight.num_scales() + kernels::kAbsmaxBlock - 1) / kernels::kAbsmaxBlock;
  TensorPart part{
      .name = weight.name + ".nested_absmax", .dtype = DType::kF32, .shape = {n}, .numel = n};
  part.read = [reader, &weight](int64_t offset, std::span<std::byte> to) {
    std::memcpy(to.data(), reader->nested_scales(weight).absmax.data() + offset, to.size());
  };
  return part;
}

/// `part`, read as elements of `dtype`.
TensorPart converted_part(TensorPart part, DType dtype) {
  const DType from = part.dtype;
  const bool is_float =
      from == DType::kF32 || from == DType::kBF16 || from == DType::kF16 || from == DType::kF64;
  if (from == dtype || !is_float) return part;
  part.dtype = dtype;
  part.source = {};
  part.read = [read = part.read, from, dtype](int64_t offset, std::span<std::byte> to) {
    const size_t n = to.size() / dtype_bytes(dtype);
    std::vector<std::byte> values(n * dtype_bytes(from));
    read(offset, values);
    convert_floats(values.data(), from, to.data(), dtype, n);
  };
  return part;
}

}  // namespace

void add_quantized_parts(const Reader& reader, const QuantizedWeight& weight, StateDict& state) {
  state.tensors.push_back(codes_part(reader, weight));
  state.tensors.push_back(scales_part(reader, weight));
  const std::string& name = weight.name;
  if (weight.is_int8()) {
    const uint8_t rows = 0;
    state.tensors.push_back(known_part(name + "_format", DType::kU8, {}, &rows, 1));
    return;
  }
  const float* const values = kernels::four_bit_table(weight.code()).values;
  state.tensors.push_back(known_part(name + ".quant_map", DType::kF32, {16}, values, 64));
  float offset = 0;
  if (weight.double_quant) {
    offset = reader->nested_scales(weight).offset;
    const float* const map = kernels::signed_dynamic_map().values;
    state.tensors.push_back(nested_part(reader, weight));
    state.tensors.push_back(known_part(name + ".nested_quant_map", DType::kF32, {256}, map, 1024));
  }
  const std::string text = quant_state_text(weight, offset);
  const auto bytes = static_cast<int64_t>(text.size());
  state.tensors.push_back(
      known_part(cat(name, ".quant_state.bitsandbytes__", io::quant_kind_name(weight.kind)),
                 DType::kU8, {bytes}, text.data(), text.size()));
}

StateDict quantized_state(const std::shared_ptr<QuantizedReader>& reader,
                          std::optional<DType> dtype) {
  // The parts of weights that are stored quantised are made anew from the weights.
  std::vector<std::string> parts;
  for (const auto& [name, weight] : reader->weights()) {
    const auto of_weight = quantized_part_names(weight);
    parts.insert(parts.end(), of_weight.begin(), of_weight.end());
  }
  std::sort(parts.begin(), parts.end());
  const std::shared_ptr<StoredReader> stored(reader, &reader->stored());
  StateDict state;
  for (TensorPart& part : stored_state(stored).tensors) {
    const auto weight = reader->weights().find(part.name);
    if (weight != reader->weights().end()) {
      add_quantized_parts(reader, weight->second, state);
    } else if (!std::binary_search(parts.begin(), parts.end(), part.name)) {
      state.tensors.push_back(dtype ? converted_part(std::move(part), *dtype) : std::move(part));
    }
  }
  return state;
}

void write_quantized_model(const std::string& from, const std::string& to,
                           const io::QuantizationConfig& config, std::optional<DType> dtype,
                           int64_t max_file_bytes) {
  const std::string config_path = from + "/config.json";
  io::Json model = io::Json::read(config_path);
  if (io::QuantizationConfig::from_model_config(model, config_path))
    throw ModelError(cat(config_path, ": the model is quantised already"));
  auto stored = std::make_shared<StoredReader>(StoredTensors::open(from));
  const auto names = linear_weight_names(stored->stored(),
                                         config.skip_modules.value_or(std::vector<std::string>{}));
  const QuantizeOptions options{.kind = config.kind,
                                .double_quant = config.double_quant,
                                .storage = config.storage,
                                .dtype = dtype};
  const auto reader = std::make_shared<QuantizedReader>(std::move(stored), options, names);
  write_converted(quantized_state(reader, dtype), {.max_file_bytes = max_file_bytes}, to);
  if (dtype) {
    for (const char* key : {"dtype", "torch_dtype"}) {
      if (model.contains(key)) model[key] = std::string(dtype_name(*dtype));
    }
  }
  io::write_text_atomic(to + "/config.json", io::with_quantization(model, config).dump(2) + "\n");
}

}  // namespace fsdp::checkpoint
