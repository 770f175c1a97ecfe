#include "libfsdp/lora/quantized.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <set>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/quantized_reader.h"
#include "libfsdp/checkpoint/verdict.h"
#include "libfsdp/kernels/quantized_weight.h"
#include "libfsdp/lora/adapters.h"
#include "libfsdp/lora/linear_base.h"
#include "libfsdp/lora/target.h"
#include "libfsdp/shard/shell.h"

namespace fsdp::lora {
namespace {

constexpr int64_t kChunk = int64_t{1}
                           << 20;  // Elements that are quantised at a time; whole blocks.
constexpr int64_t kNestedBlock = kernels::kAbsmaxBlock;

/// A quantised Linear without adapters.
class PackedLinear : public LinearBase {
 public:
  at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                    const at::Tensor& bias) override {
    return frozen_linear(x, {weight, packed}, bias);
  }
  std::optional<LowRank> plain_adapter() const override { return LowRank{}; }
  at::Tensor embedding(const at::Tensor&, const at::Tensor&, int64_t, bool) override {
    throw InternalError("an embedding is not quantised");
  }
  at::Tensor convolve(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                      const Convolution&) override {
    throw InternalError("a convolution is not quantised");
  }
  at::Tensor matrix(const at::Tensor&, const std::string& operation) override {
    throw ConfigError(cat("[quantization] '", operation,
                          "' reads the weight of a layer that is quantised. Hint: leave the module "
                          "out of the quantisation."));
  }
};

bool ends_with_one_of(const std::string& name, const std::vector<std::string>& ends) {
  return std::any_of(ends.begin(), ends.end(), [&](const std::string& end) {
    return name == end || name.ends_with("." + end);
  });
}

PackedWeight describe(const at::Tensor& weight, const QuantizationOptions& options) {
  PackedWeight packed{.format = options.format,
                      .rows = weight.size(0),
                      .columns = weight.size(1),
                      .blocksize = options.blocksize,
                      .double_quant = options.double_quant};
  if (options.format == PackedFormat::kInt8) {
    packed.blocksize = packed.columns;
    packed.double_quant = false;
  }
  return packed;
}

PackedFormat format_of(io::QuantKind kind) {
  if (kind == io::QuantKind::kInt8) return PackedFormat::kInt8;
  return kind == io::QuantKind::kNf4 ? PackedFormat::kNf4 : PackedFormat::kFp4;
}
io::QuantKind kind_of(PackedFormat format) {
  if (format == PackedFormat::kInt8) return io::QuantKind::kInt8;
  return format == PackedFormat::kNf4 ? io::QuantKind::kNf4 : io::QuantKind::kFp4;
}

void check_options(const QuantizationOptions& options) {
  const int64_t size = options.blocksize;
  if (size < 32 || size > 4096 || (size & (size - 1)) != 0) {
    throw ConfigError(cat("[quantization] blocksize ", size,
                          ": expected a power of two from 32 to "
                          "4096"));
  }
}

// One weight on one rank: which of its bytes the rank owns, and where they come from.
class Loader {
 public:
  Loader(ShardedCore& core, checkpoint::QuantizedReader& reader, const std::string& name,
         const PackedWeight& packed, const OwnedSlice* piece)
      : core_(core), reader_(reader), name_(name), packed_(packed), piece_(piece) {}

  // This rank's codes; those that are made here with the scales of their elements.
  void load_codes() {
    const checkpoint::QuantizedWeight& weight = reader_.weight(name_);
    const std::vector<int64_t> shape = {packed_.rows, packed_.columns};
    if (weight.shape != shape)
      throw ModelError(cat(reader_.stored().stored().directory(), ": tensor '", name_, "' is ",
                           io::shape_text(weight.shape), "; expected ", io::shape_text(shape)));
    const int64_t per_byte = packed_.elements_per_code_byte();
    const int64_t begin = owned_begin() * per_byte;
    const int64_t end = std::min(owned_code_end() * per_byte, packed_.numel());
    for (int64_t at = begin; at < end;) at = load_from(weight, at, end);
  }

  const std::vector<float>& scales() const { return scales_; }

  // All scales, in the order of the ranks, which is that of the elements.
  void write_scales(std::vector<float> all) {
    all.resize(static_cast<size_t>(packed_.scales()));
    if (!packed_.double_quant) {
      write_bytes(packed_.scales_at(), std::as_bytes(std::span<const float>(all)));
      return;
    }
    checkpoint::NestedScales nested;
    nested.offset = kernels::mean_absmax(all.data(), packed_.scales());
    nested.codes.resize(all.size());
    nested.absmax.resize(static_cast<size_t>((packed_.scales() + kNestedBlock - 1) / kNestedBlock));
    kernels::quantize_absmax(all.data(), packed_.scales(), nested.offset, nested.codes.data(),
                             nested.absmax.data());
    write_nested(nested);
  }

  // Those of quantised files, where this rank owns any.
  void load_scales() {
    if (!piece_ || piece_->param_at + piece_->numel <= packed_.scales_at()) return;
    const checkpoint::QuantizedWeight& weight = reader_.weight(name_);
    if (packed_.double_quant) return write_nested(reader_.nested_scales(weight));
    std::vector<float> all(static_cast<size_t>(packed_.scales()));
    reader_.read(weight, 0, weight.numel, {}, all);
    write_scales(std::move(all));
  }

 private:
  int64_t owned_begin() const { return piece_ ? std::min(piece_->param_at, code_end()) : 0; }
  int64_t owned_code_end() const {
    return piece_ ? std::min(piece_->param_at + piece_->numel, code_end()) : 0;
  }
  int64_t code_end() const { return packed_.code_bytes(); }

  // Elements from `at`, some MB of them; returns where they end. A rank that owns a part of a block
  // reads all of it.
  int64_t load_from(const checkpoint::QuantizedWeight& weight, int64_t at, int64_t end) {
    const int64_t block = packed_.blocksize;
    const int64_t first = at / block * block;
    const int64_t most = std::max(kChunk / block, int64_t{1}) * block;
    const int64_t last =
        std::min({first + most, (end + block - 1) / block * block, packed_.numel()});
    codes_.resize(static_cast<size_t>(weight.code_bytes(last - first)));
    std::vector<float> scales;
    if (reader_.quantizes()) scales.resize(static_cast<size_t>((last - first + block - 1) / block));
    reader_.read(weight, first, last, codes_, scales);
    write_bytes(first / packed_.elements_per_code_byte(), codes_);
    // A block that begins before this rank's elements is that rank's.
    const std::ptrdiff_t skipped = first < at && !scales.empty() ? 1 : 0;
    scales_.insert(scales_.end(), scales.begin() + skipped, scales.end());
    return last;
  }

  void write_nested(const checkpoint::NestedScales& nested) {
    write_bytes(packed_.scales_at(), std::as_bytes(std::span(nested.codes)));
    write_bytes(packed_.nested_at(), std::as_bytes(std::span(nested.absmax)));
    write_bytes(packed_.offset_at(), std::as_bytes(std::span(&nested.offset, 1)));
  }

  // Those of `bytes`, which lie at `at` of the packed weight, that this rank owns.
  void write_bytes(int64_t at, std::span<const std::byte> bytes) {
    if (!piece_) return;
    const int64_t begin = std::max(at, piece_->param_at);
    const int64_t end =
        std::min(at + static_cast<int64_t>(bytes.size()), piece_->param_at + piece_->numel);
    if (begin >= end) return;
    engine::Storage& storage = core_.executor().storage();
    storage.home().write(
        storage.shard(piece_->bucket) + piece_->shard_at + begin - piece_->param_at,
        bytes.data() + (begin - at), static_cast<size_t>(end - begin));
  }

  ShardedCore& core_;
  checkpoint::QuantizedReader& reader_;
  const std::string& name_;
  const PackedWeight& packed_;
  const OwnedSlice* piece_;  // Null: this rank owns nothing of it.
  std::vector<std::byte> codes_;
  std::vector<float> scales_;
};

// Where the bytes of all weights come from. Scales that are made here are quantised when all ranks
// have told theirs, so the reader leaves them as they are.
std::unique_ptr<checkpoint::QuantizedReader> open_reader(
    const io::HfWeights& files, const std::optional<QuantizationOptions>& options,
    const std::vector<std::string>& names) {
  auto stored = std::make_shared<checkpoint::StoredReader>(checkpoint::StoredTensors::of(files));
  if (!options) return std::make_unique<checkpoint::QuantizedReader>(std::move(stored));
  const checkpoint::QuantizeOptions made{.kind = kind_of(options->format),
                                         .blocksize = options->blocksize};
  return std::make_unique<checkpoint::QuantizedReader>(std::move(stored), made, names);
}

// The scales that the ranks of one replica have made, in the order of the elements.
std::vector<float> all_scales(ShardedCore& core, std::vector<float> mine) {
  comm::Communicator& comm = core.comm();
  const auto most = comm.maximum(static_cast<int64_t>(mine.size()), "scales");
  const auto count = static_cast<float>(mine.size());  // Exact: below 2^24 for any weight.
  mine.resize(static_cast<size_t>(most));
  mine.push_back(count);
  std::vector<float> all(mine.size() * static_cast<size_t>(comm.size()));
  comm.exchange(mine.data(), mine.size() * sizeof(float), all.data(), comm::make_tag("scales"));
  // Ranks of one replica hold all elements in their order; the others do the same again.
  const int group = core.executor().layout().mesh.shard;
  std::vector<float> scales;
  for (int rank = 0; rank < group; ++rank) {
    const float* of_rank = all.data() + static_cast<size_t>(rank) * mine.size();
    scales.insert(scales.end(), of_rank, of_rank + static_cast<int64_t>(of_rank[most]));
  }
  return scales;
}

}  // namespace

QuantizedWeights::QuantizedWeights(torch::nn::Module& model, QuantizationOptions options)
    : options_(std::move(options)) {
  check_options(*options_);
  for (const auto& entry : model.named_modules()) {
    const auto target = find_target(*entry.value());
    if (!target || target->kind != TargetKind::kLinear) continue;
    if (ends_with_one_of(entry.key(), options_->skip_modules)) continue;
    pack(*target, entry.key(), describe(target->weight, *options_));
  }
  if (names_.empty()) throw ConfigError("[quantization] the model has no Linear to quantise");
  file_names_ = names_;
}

QuantizedWeights::QuantizedWeights(torch::nn::Module& model,
                                   const checkpoint::QuantizedWeights& stored) {
  const auto modules = model.named_modules();
  for (const auto& [name, weight] : stored) {
    const std::string module = name.substr(0, name.rfind('.'));
    const auto* found = modules.find(module);
    const auto target = found ? find_target(**found) : std::nullopt;
    if (!target || target->kind != TargetKind::kLinear || weight.shape.size() != 2) {
      throw ModelError(cat("[quantization] the files hold '", name, "' as ",
                           io::quant_kind_name(weight.kind),
                           ": only weights of linear layers can be"));
    }
    pack(*target, module,
         {.format = format_of(weight.kind),
          .rows = weight.shape[0],
          .columns = weight.shape[1],
          .blocksize = weight.blocksize,
          .double_quant = weight.double_quant});
    const auto parts = checkpoint::quantized_part_names(weight);
    file_names_.insert(file_names_.end(), parts.begin(), parts.end());
  }
  file_names_.insert(file_names_.end(), names_.begin(), names_.end());
}

// What the weight of the module computes with, and keeps, from now on.
void QuantizedWeights::pack(const TargetLayer& target, const std::string& module,
                            const PackedWeight& packed) {
  const at::Tensor& weight = target.weight;
  if (weight.requires_grad()) {
    throw ConfigError(cat("[quantization] '", module,
                          "' is trained: a quantised weight cannot be. Hint: train adapters, or "
                          "leave the module out of the quantisation."));
  }
  auto shared = std::make_shared<const PackedWeight>(packed);
  auto* adapter = dynamic_cast<LinearBase*>(weight_adapter(weight));
  if (!adapter) {
    auto plain = std::make_shared<PackedLinear>();
    adapter = plain.get();
    set_weight_adapter(weight, plain, target.operations);
  }
  adapter->packed = shared;
  replace_data(weight, at::empty({shared->bytes()}, at::TensorOptions(at::kMeta).dtype(at::kByte)));
  names_.push_back(module + ".weight");
  weights_.push_back(std::move(shared));
}

std::function<bool(const std::string&)> QuantizedWeights::left_out() const {
  return [names = std::set<std::string>(names_.begin(), names_.end())](const std::string& name) {
    return names.count(name) != 0 || Adapters::is_adapter(name);
  };
}

int64_t QuantizedWeights::bytes() const {
  int64_t sum = 0;
  for (const auto& weight : weights_) sum += weight->bytes();
  return sum;
}

int64_t QuantizedWeights::numel() const {
  int64_t sum = 0;
  for (const auto& weight : weights_) sum += weight->numel();
  return sum;
}

void QuantizedWeights::load(ShardedCore& core, const io::HfWeights& weights) const {
  const std::vector<OwnedSlice> owned = core.owned_slices();
  const checkpoint::Verdict verdict(core.comm());
  std::unique_ptr<checkpoint::QuantizedReader> reader;
  checkpoint::Outcome opened;
  opened.run([&] { reader = open_reader(weights, options_, names_); });
  verdict.agree(opened, "quantised weights are opened");
  for (size_t i = 0; i < names_.size(); ++i) {
    const auto piece = std::find_if(owned.begin(), owned.end(), [&](const OwnedSlice& slice) {
      return slice.name == names_[i];
    });
    Loader loader(core, *reader, names_[i], *weights_[i], piece == owned.end() ? nullptr : &*piece);
    checkpoint::Outcome loaded;
    loaded.run([&] {
      loader.load_codes();
      if (!reader->quantizes()) loader.load_scales();
    });
    verdict.agree(loaded, "weights are quantised");
    if (!reader->quantizes()) continue;
    std::vector<float> scales = all_scales(core, loader.scales());
    check(static_cast<int64_t>(scales.size()) == weights_[i]->scales(),
          "the ranks have not quantised all of a weight");
    loader.write_scales(std::move(scales));
  }
  core.publish();
}

}  // namespace fsdp::lora
