#include "libfsdp/checkpoint/quantized_reader.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"
#include "libfsdp/kernels/quantized_weight.h"

namespace fsdp::checkpoint {
namespace {

constexpr int64_t kPiece = int64_t{1} << 18;  // Elements, about, that are quantised at once.

bool is_float(const std::optional<DType>& dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16;
}

QuantizedWeight planned_weight(const StoredTensors& stored, const std::string& name,
                               const QuantizeOptions& options) {
  const StoredTensor* const tensor = stored.find(name);
  const auto fail = [&](const std::string& text) {
    throw ModelError(cat(stored.directory(), ": tensor '", name, "' ", text));
  };
  if (tensor == nullptr) fail("is to be quantised, but is not there");
  if (!is_float(tensor->dtype)) fail(cat("is ", tensor->dtype_name, ", which is not quantised"));
  const bool is_int8 = options.kind == io::QuantKind::kInt8;
  if (is_int8 && (tensor->shape.size() != 2 || tensor->shape[1] == 0))
    fail(cat("has the shape ", io::shape_text(tensor->shape), "; int8 quantises rows of a matrix"));
  if (const auto hole = uncovered_range(*tensor, tensor->shape))
    fail(cat("lacks its elements [", hole->first, ", ", hole->second, ")"));
  QuantizedWeight weight{.name = name, .kind = options.kind, .shape = tensor->shape, .numel = 1};
  for (const int64_t dim : tensor->shape)
    weight.numel = checked_mul<ModelError>(weight.numel, dim, name);
  weight.dtype = is_int8 ? DType::kF32 : options.dtype.value_or(*tensor->dtype);
  weight.storage = is_int8 ? DType::kI8 : options.storage;
  weight.blocksize = is_int8 ? tensor->shape[1] : options.blocksize;
  weight.double_quant = options.double_quant && !is_int8;
  const auto width = static_cast<int64_t>(dtype_bytes(weight.storage));
  if (weight.code_bytes(weight.numel) % width != 0)
    fail(cat("has ", weight.code_bytes(weight.numel), " bytes of codes, which are no ",
             dtype_name(weight.storage), "s"));
  return weight;
}

}  // namespace

QuantizedReader::QuantizedReader(std::shared_ptr<StoredReader> reader)
    : reader_(std::move(reader)), weights_(find_quantized_weights(*reader_)) {}

QuantizedReader::QuantizedReader(std::shared_ptr<StoredReader> reader,
                                 const QuantizeOptions& options, std::span<const std::string> names)
    : reader_(std::move(reader)), quantizes_(true), convert_to_(options.dtype) {
  if (const auto found = find_quantized_weights(*reader_); !found.empty())
    throw ModelError(cat(reader_->stored().directory(), ": '", found.begin()->first,
                         "' is quantised already, as ",
                         io::quant_kind_name(found.begin()->second.kind)));
  if (options.dtype && !is_float(options.dtype))
    throw ConfigError(cat("weights are not quantised from ", dtype_name(*options.dtype)));
  for (const std::string& name : names)
    weights_.emplace(name, planned_weight(reader_->stored(), name, options));
}

QuantizedReader::QuantizedReader(const QuantizedReader& base, std::span<const std::string> names,
                                 WeightElements elements)
    : reader_(base.reader_), quantizes_(true), elements_(std::move(elements)) {
  check(!base.quantizes_, "QuantizedReader: the base is not quantised");
  for (const std::string& name : names) weights_.emplace(name, base.weight(name));
}

const QuantizedWeight& QuantizedReader::weight(std::string_view name) const {
  const auto found = weights_.find(name);
  if (found == weights_.end())
    throw ModelError(
        cat(reader_->stored().directory(), ": '", name, "' is not a quantised weight"));
  return found->second;
}

void QuantizedReader::read(const QuantizedWeight& weight, int64_t begin, int64_t end,
                           std::span<std::byte> codes, std::span<float> scales) {
  const int64_t block = weight.blocksize;
  check(begin >= 0 && begin <= end && end <= weight.numel, "QuantizedReader: range");
  check(weight.is_int8() || (begin % block == 0 && (end % block == 0 || end == weight.numel)),
        "QuantizedReader: the range is not whole blocks");
  check(codes.empty() || static_cast<int64_t>(codes.size()) == weight.code_bytes(end - begin),
        "QuantizedReader: bytes of codes");
  if (begin == end) return;
  const int64_t first = begin / block;
  const int64_t count = (end + block - 1) / block - first;
  check(scales.empty() || static_cast<int64_t>(scales.size()) == count,
        "QuantizedReader: number of scales");
  if (weight.double_quant && !scales.empty()) {
    const NestedScales& nested = nested_scales(weight);
    kernels::dequantize_absmax(nested.codes.data() + first,
                               nested.absmax.data() + first / kernels::kAbsmaxBlock, nested.offset,
                               first % kernels::kAbsmaxBlock, count, scales.data());
    check_finite(weight, scales, first);
    scales = {};
  }
  if (quantizes_ && (!codes.empty() || !scales.empty()))
    quantize(weight, begin, end, codes, scales);
  if (!quantizes_) read_stored(weight, begin, codes, scales);
}

void QuantizedReader::read_stored(const QuantizedWeight& weight, int64_t begin,
                                  std::span<std::byte> codes, std::span<float> scales) {
  const StoredTensors& stored = reader_->stored();
  if (!codes.empty())
    read_bytes(*stored.find(weight.name), weight.is_int8() ? begin : begin / 2, codes);
  if (scales.empty()) return;
  const int64_t first = begin / weight.blocksize;
  reader_->read(*stored.find(weight.scales_name()), first, std::as_writable_bytes(scales));
  check_finite(weight, scales, first);
}

void QuantizedReader::read_bytes(const StoredTensor& tensor, int64_t begin,
                                 std::span<std::byte> out) {
  const auto width = static_cast<int64_t>(dtype_bytes(*tensor.dtype));
  const int64_t end = begin + static_cast<int64_t>(out.size());
  if (begin % width == 0 && end % width == 0) return reader_->read(tensor, begin / width, out);
  const int64_t first = begin / width;
  const int64_t last = (end + width - 1) / width;
  codes_.resize(static_cast<size_t>((last - first) * width));
  reader_->read(tensor, first, codes_);
  std::memcpy(out.data(), codes_.data() + (begin - first * width), out.size());
}

QuantizedReader::Floats QuantizedReader::floats(const QuantizedWeight& weight, int64_t at,
                                                int64_t n) {
  if (elements_) {
    converted_.resize(static_cast<size_t>(n) * sizeof(float));
    elements_(weight, at, {reinterpret_cast<float*>(converted_.data()), static_cast<size_t>(n)});
    return {converted_.data(), DType::kF32};
  }
  const StoredTensor& tensor = *reader_->stored().find(weight.name);
  const DType stored = *tensor.dtype;
  const DType dtype = convert_to_.value_or(stored);
  values_.resize(static_cast<size_t>(n) * dtype_bytes(stored));
  reader_->read(tensor, at, values_);
  if (stored == dtype) return {values_.data(), dtype};
  converted_.resize(static_cast<size_t>(n) * dtype_bytes(dtype));
  convert_floats(values_.data(), stored, converted_.data(), dtype, static_cast<size_t>(n));
  return {converted_.data(), dtype};
}

void QuantizedReader::quantize(const QuantizedWeight& weight, int64_t begin, int64_t end,
                               std::span<std::byte> codes, std::span<float> scales) {
  const int64_t block = weight.blocksize;
  const int64_t piece = std::max(int64_t{1}, kPiece / block) * block;
  const int64_t last = std::min((end + block - 1) / block * block, weight.numel);
  for (int64_t at = begin / block * block; at < last; at += piece) {
    const int64_t n = std::min(piece, last - at);
    const int64_t blocks = (n + block - 1) / block;
    codes_.resize(static_cast<size_t>(weight.code_bytes(n)));
    scales_.resize(static_cast<size_t>(blocks));
    const auto [values, dtype] = floats(weight, at, n);
    if (weight.is_int8()) {
      kernels::quantize_int8(values, dtype, blocks, block, reinterpret_cast<int8_t*>(codes_.data()),
                             scales_.data());
    } else {
      kernels::quantize_4bit(values, dtype, n, weight.code(), block,
                             reinterpret_cast<uint8_t*>(codes_.data()), scales_.data());
    }
    check_finite(weight, scales_, at / block);
    if (!scales.empty())
      std::copy(scales_.begin(), scales_.end(),
                scales.begin() + (at - begin / block * block) / block);
    if (codes.empty()) continue;
    const int64_t from = std::max(at, begin);  // Of int8 the first and last row may be cut.
    const int64_t count = weight.code_bytes(std::min(at + n, end) - from);
    std::memcpy(codes.data() + weight.code_bytes(from - begin),
                codes_.data() + weight.code_bytes(from - at), static_cast<size_t>(count));
  }
}

void QuantizedReader::check_finite(const QuantizedWeight& weight, std::span<const float> scales,
                                   int64_t first) const {
  const auto bad =
      std::find_if(scales.begin(), scales.end(), [](float scale) { return !std::isfinite(scale); });
  if (bad == scales.end()) return;
  const int64_t at = (first + (bad - scales.begin())) * weight.blocksize;
  const std::string where =
      cat(reader_->stored().directory(), ": quantised weight '", weight.name, "': ");
  if (!quantizes_)
    throw ModelError(cat(where, "the scale of the elements from ", at, " on is not finite"));
  throw ModelError(cat(
      where, "among the ", weight.blocksize, " elements from ", at, " on is an infinity or a NaN",
      weight.is_int8() ? ", or a number above 65504, which int8 cannot keep" : ""));
}

void QuantizedReader::dequantize(const QuantizedWeight& weight, int64_t begin,
                                 std::span<float> out) {
  if (out.empty()) return;
  const int64_t block = weight.blocksize;
  const int64_t end = begin + static_cast<int64_t>(out.size());
  const int64_t first = weight.is_int8() ? begin : begin / block * block;
  const int64_t last =
      weight.is_int8() ? end : std::min((end + block - 1) / block * block, weight.numel);
  const int64_t n = last - first;
  std::vector<std::byte> codes(static_cast<size_t>(weight.code_bytes(n)));
  std::vector<float> scales(static_cast<size_t>((last + block - 1) / block - first / block));
  read(weight, first, last, codes, scales);
  std::vector<std::byte> values(static_cast<size_t>(n) * dtype_bytes(weight.dtype));
  if (weight.is_int8()) {
    kernels::dequantize_int8(reinterpret_cast<const int8_t*>(codes.data()), scales.data(), block,
                             first % block, n, values.data(), weight.dtype);
  } else {
    kernels::dequantize_4bit(reinterpret_cast<const uint8_t*>(codes.data()), scales.data(), n,
                             weight.code(), block, values.data(), weight.dtype);
  }
  convert_floats(values.data() + static_cast<size_t>(begin - first) * dtype_bytes(weight.dtype),
                 weight.dtype, out.data(), DType::kF32, out.size());
}

const NestedScales& QuantizedReader::nested_scales(const QuantizedWeight& weight) {
  check(weight.double_quant, "nested_scales: a weight without double quantisation");
  if (nested_of_ == weight.name) return nested_;
  nested_of_.clear();
  const int64_t n = weight.num_scales();
  nested_.codes.resize(static_cast<size_t>(n));
  nested_.absmax.resize(
      static_cast<size_t>((n + kernels::kAbsmaxBlock - 1) / kernels::kAbsmaxBlock));
  if (quantizes_) {
    std::vector<float> scales(static_cast<size_t>(n));
    if (n > 0) quantize(weight, 0, weight.numel, {}, scales);
    nested_.offset = kernels::mean_absmax(scales.data(), n);
    kernels::quantize_absmax(scales.data(), n, nested_.offset, nested_.codes.data(),
                             nested_.absmax.data());
  } else {
    const StoredTensors& stored = reader_->stored();
    nested_.offset = weight.offset;
    reader_->read(*stored.find(weight.name + ".absmax"), 0,
                  std::as_writable_bytes(std::span(nested_.codes)));
    reader_->read(*stored.find(weight.name + ".nested_absmax"), 0,
                  std::as_writable_bytes(std::span(nested_.absmax)));
  }
  nested_of_ = weight.name;
  return nested_;
}

std::vector<std::string> linear_weight_names(const StoredTensors& stored,
                                             std::span<const std::string> skip_modules) {
  constexpr std::string_view kSuffix = ".weight";
  std::vector<std::string> names;
  for (const auto& [name, tensor] : stored.tensors()) {
    if (!name.ends_with("_proj.weight") || tensor.shape.size() != 2) continue;
    const std::string_view module = std::string_view(name).substr(0, name.size() - kSuffix.size());
    const bool skipped =
        std::any_of(skip_modules.begin(), skip_modules.end(), [&](const std::string& skip) {
          return module.ends_with(skip) || module.starts_with(skip + ".");
        });
    if (!skipped) names.push_back(name);
  }
  return names;
}

}  // namespace fsdp::checkpoint
