// Any range of a quantised weight: from files that hold it quantised, or quantised on the way from
// files of 16 or 32 bits, or from elements that somebody computes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "libfsdp/checkpoint/quantized_tensors.h"
#include "libfsdp/checkpoint/state_dict.h"

namespace fsdp::checkpoint {

struct QuantizeOptions {
  io::QuantKind kind = io::QuantKind::kNf4;
  bool double_quant = false;
  DType storage = DType::kU8;  ///< 4 bits: of the codes, when they are written.
  /// What floating tensors are converted to first, as when transformers loads them; empty = as they
  /// are.
  std::optional<DType> dtype;
  int64_t blocksize = 64;  ///< 4 bits: elements that share a scale.
};

/// Scales of a whole weight as double quantisation keeps them, 8 bits each.
struct NestedScales {
  std::vector<uint8_t> codes;  ///< One per block.
  std::vector<float> absmax;   ///< One per 256 codes.
  float offset = 0;
};

/// Elements [at, at + out.size()) of a weight, wherever they come from.
using WeightElements =
    std::function<void(const QuantizedWeight& weight, int64_t at, std::span<float> out)>;

/// Used by one thread at a time. Memory: one buffer of 1 MB; with double quantisation the scales of
/// one whole weight (numel / 64 bytes; while they are made, five times that).
class QuantizedReader {
 public:
  /// The weights that the files hold quantised. Throws: as find_quantized_weights().
  explicit QuantizedReader(std::shared_ptr<StoredReader> reader);

  /// Of files that are not quantised: the tensors `names` as `options` say.
  /// Throws: ModelError for a tensor that is missing, is not floating, or (int8) is no matrix, and
  /// for files that are quantised already.
  QuantizedReader(std::shared_ptr<StoredReader> reader, const QuantizeOptions& options,
                  std::span<const std::string> names);

  /// Of `base`, whose files are quantised, the weights `names` anew, in the same form, from other
  /// elements.
  QuantizedReader(const QuantizedReader& base, std::span<const std::string> names,
                  WeightElements elements);

  const QuantizedWeights& weights() const { return weights_; }
  /// Throws: ModelError when there is none of that name.
  const QuantizedWeight& weight(std::string_view name) const;
  bool quantizes() const { return quantizes_; }
  StoredReader& stored() { return *reader_; }

  /// Elements [begin, end) of the flattened weight: weight.code_bytes(end - begin) bytes of codes,
  /// and the scales of the blocks (int8: of the rows) that the range meets, as training sees them:
  /// with double quantisation those that its codes stand for. Either span may be empty: not wanted.
  /// In 4 bits `begin` is a multiple of the block size, `end` too, or the weight's end.
  /// Cost: of quantising, the range (int8: whole rows) is read and quantised; with double
  /// quantisation the whole weight is, once for consecutive calls on one weight.
  /// Throws: ModelError also for elements, or scales, that are not finite, naming the tensor.
  void read(const QuantizedWeight& weight, int64_t begin, int64_t end, std::span<std::byte> codes,
            std::span<float> scales);

  /// Elements [begin, begin + out.size()) as bitsandbytes dequantises them: rounded to the type
  /// that the weight was quantised from. Cost: as read() of the blocks that the range meets.
  void dequantize(const QuantizedWeight& weight, int64_t begin, std::span<float> out);

  /// The scales of a whole weight, for a range of which dequantize_absmax() computes any. Valid
  /// until the next call. Requires: weight.double_quant.
  const NestedScales& nested_scales(const QuantizedWeight& weight);

 private:
  void read_stored(const QuantizedWeight& weight, int64_t begin, std::span<std::byte> codes,
                   std::span<float> scales);
  void read_bytes(const StoredTensor& tensor, int64_t begin, std::span<std::byte> out);
  void quantize(const QuantizedWeight& weight, int64_t begin, int64_t end,
                std::span<std::byte> codes, std::span<float> scales);
  /// What is to be quantised: n elements from `at`; valid until the next call.
  struct Floats {
    const void* values;
    DType dtype;
  };
  Floats floats(const QuantizedWeight& weight, int64_t at, int64_t n);
  void check_finite(const QuantizedWeight& weight, std::span<const float> scales,
                    int64_t first) const;

  std::shared_ptr<StoredReader> reader_;
  bool quantizes_ = false;
  std::optional<DType> convert_to_;
  WeightElements elements_;
  QuantizedWeights weights_;
  std::string nested_of_;
  NestedScales nested_;
  std::vector<std::byte> values_, converted_, codes_;
  std::vector<float> scales_;
};

/// Names of the linear layers' weights of a Llama-like model: matrices `*_proj.weight`, without
/// those of `skip_modules`. Sorted.
std::vector<std::string> linear_weight_names(const StoredTensors& stored,
                                             std::span<const std::string> skip_modules = {});

/// The parts that `weight`, one of the reader's, has in bitsandbytes' files, read through the
/// reader. Cost: with double quantisation, that of nested_scales().
void add_quantized_parts(const std::shared_ptr<QuantizedReader>& reader,
                         const QuantizedWeight& weight, StateDict& state);

/// A model directory's tensors with the reader's weights in bitsandbytes' parts and all others as
/// they are (floating ones as options.dtype, if given), as a state of one rank that reads through
/// the reader. Throws: as stored_state(). Cost: with double quantisation all weights are read once.
StateDict quantized_state(const std::shared_ptr<QuantizedReader>& reader,
                          std::optional<DType> dtype = std::nullopt);

/// Writes model files and config.json of `from`, a directory of 16- or 32-bit weights, as
/// bitsandbytes quantises them into `to`, which exists: what transformers writes when it has loaded
/// `from` with this configuration. Other files are not copied.
/// Memory: a few MB, and with double quantisation see QuantizedReader. Throws: ModelError,
/// ConfigError, HostResourceError.
void write_quantized_model(const std::string& from, const std::string& to,
                           const io::QuantizationConfig& config,
                           std::optional<DType> dtype = std::nullopt,
                           int64_t max_file_bytes = io::kDefaultMaxShardBytes);

}  // namespace fsdp::checkpoint
