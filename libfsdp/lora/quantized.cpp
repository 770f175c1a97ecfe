#include "libfsdp/lora/quantized.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "libfsdp/base/error.h"
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

void check_options(const QuantizationOptions& options) {
  const int64_t size = options.blocksize;
  if (size < 32 || size > 4096 || (size & (size - 1)) != 0) {
    throw ConfigError(cat("[quantization] blocksize ", size,
                          ": expected a power of two from 32 to "
                          "4096"));
  }
}

// One weight on one rank: which of its bytes the rank owns, and how they are made.
class Loader {
 public:
  Loader(ShardedCore& core, const io::HfWeights& files, const std::string& name,
         const PackedWeight& packed, const OwnedSlice* piece)
      : core_(core), files_(files), name_(name), packed_(packed), piece_(piece) {}

  // This rank's codes, and the scales of their elements.
  void quantize_own() {
    const auto found = files_.find(name_);
    if (!found) throw ModelError(cat(files_.directory(), ": no tensor '", name_, "'"));
    const std::vector<int64_t> shape = {packed_.rows, packed_.columns};
    if (found->entry->shape != shape || !found->entry->dtype) {
      throw ModelError(cat(files_.directory(), ": tensor '", name_, "' is ",
                           found->entry->dtype_name, " ", io::shape_text(found->entry->shape),
                           "; expected a floating ", io::shape_text(shape)));
    }
    const int64_t begin = owned_begin() * packed_.elements_per_code_byte();
    const int64_t end =
        std::min(owned_code_end() * packed_.elements_per_code_byte(), packed_.numel());
    for (int64_t at = begin; at < end;) at = quantize_from(*found, at, end);
  }

  const std::vector<float>& scales() const { return scales_; }

  // All scales, in the order of the ranks, which is that of the elements.
  void write_scales(std::vector<float> all) {
    all.resize(static_cast<size_t>(packed_.scales()));
    if (!packed_.double_quant) {
      write_bytes(packed_.scales_at(), std::as_bytes(std::span<const float>(all)));
      return;
    }
    const float offset = kernels::mean_absmax(all.data(), packed_.scales());
    std::vector<uint8_t> codes(all.size());
    std::vector<float> nested(
        static_cast<size_t>((packed_.scales() + kNestedBlock - 1) / kNestedBlock));
    kernels::quantize_absmax(all.data(), packed_.scales(), offset, codes.data(), nested.data());
    write_bytes(packed_.scales_at(), std::as_bytes(std::span<const uint8_t>(codes)));
    write_bytes(packed_.nested_at(), std::as_bytes(std::span<const float>(nested)));
    write_bytes(packed_.offset_at(), std::as_bytes(std::span<const float>(&offset, 1)));
  }

 private:
  int64_t owned_begin() const { return piece_ ? std::min(piece_->param_at, code_end()) : 0; }
  int64_t owned_code_end() const {
    return piece_ ? std::min(piece_->param_at + piece_->numel, code_end()) : 0;
  }
  int64_t code_end() const { return packed_.code_bytes(); }

  int64_t quantize_from(const io::HfWeights::Location& source, int64_t at, int64_t end) {
    // Rows of int8 have one scale each, so that a rank that owns a part of a row reads all of it.
    const int64_t block = packed_.blocksize;
    const int64_t first = at / block * block;
    const int64_t most = std::max(kChunk / block, int64_t{1}) * block;
    const int64_t last =
        std::min({first + most, (end + block - 1) / block * block, packed_.numel()});
    const auto numel = last - first;
    const DType dtype = *source.entry->dtype;
    const auto item = static_cast<int64_t>(dtype_bytes(dtype));
    raw_.resize(static_cast<size_t>(numel * item));
    source.file->read(*source.entry, first * item, raw_);
    codes_.resize(static_cast<size_t>(numel));
    std::vector<float> scales(static_cast<size_t>((numel + block - 1) / block));
    if (packed_.format == PackedFormat::kInt8) {
      kernels::quantize_int8(raw_.data(), dtype, numel / block, block,
                             reinterpret_cast<int8_t*>(codes_.data()), scales.data());
    } else {
      const auto code = packed_.format == PackedFormat::kNf4 ? kernels::FourBitCode::kNf4
                                                             : kernels::FourBitCode::kFp4;
      kernels::quantize_4bit(raw_.data(), dtype, numel, code, block, codes_.data(), scales.data());
    }
    for (const float scale : scales) {
      if (!std::isfinite(scale))
        throw ModelError(cat(files_.directory(), ": tensor '", name_,
                             "' has elements that are not finite: it cannot be quantised"));
    }
    const int64_t per_byte = packed_.elements_per_code_byte();
    const auto bytes = std::as_bytes(std::span<const uint8_t>(codes_))
                           .first(static_cast<size_t>((numel + per_byte - 1) / per_byte));
    write_bytes(first / per_byte, bytes);
    // A block that begins before this rank's elements is that rank's.
    const size_t skipped = first < at ? 1 : 0;
    scales_.insert(scales_.end(), scales.begin() + static_cast<std::ptrdiff_t>(skipped),
                   scales.end());
    return last;
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
  const io::HfWeights& files_;
  const std::string& name_;
  const PackedWeight& packed_;
  const OwnedSlice* piece_;  // Null: this rank owns nothing of it.
  std::vector<std::byte> raw_;
  std::vector<uint8_t> codes_;
  std::vector<float> scales_;
};

}  // namespace

QuantizedWeights::QuantizedWeights(torch::nn::Module& model, QuantizationOptions options) {
  check_options(options);
  for (const auto& entry : model.named_modules()) {
    const auto target = find_target(*entry.value());
    if (!target || target->kind != TargetKind::kLinear) continue;
    if (ends_with_one_of(entry.key(), options.skip_modules)) continue;
    at::Tensor weight = target->weight;
    if (weight.requires_grad()) {
      throw ConfigError(cat("[quantization] '", entry.key(),
                            "' is trained: a quantised weight cannot be. Hint: train adapters, or "
                            "leave the module out of the quantisation."));
    }
    auto packed = std::make_shared<const PackedWeight>(describe(weight, options));
    auto* adapter = dynamic_cast<LinearBase*>(weight_adapter(weight));
    if (!adapter) {
      auto plain = std::make_shared<PackedLinear>();
      adapter = plain.get();
      set_weight_adapter(weight, plain, target->operations);
    }
    adapter->packed = packed;
    replace_data(weight,
                 at::empty({packed->bytes()}, at::TensorOptions(at::kMeta).dtype(at::kByte)));
    names_.push_back(entry.key() + ".weight");
    weights_.push_back(std::move(packed));
  }
  if (names_.empty()) throw ConfigError("[quantization] the model has no Linear to quantise");
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
  comm::Communicator& comm = core.comm();
  const checkpoint::Verdict verdict(comm);
  // Ranks of one replica hold all elements in their order; the others do the same again.
  const int group = core.executor().layout().mesh.shard;
  for (size_t i = 0; i < names_.size(); ++i) {
    const auto piece = std::find_if(owned.begin(), owned.end(), [&](const OwnedSlice& slice) {
      return slice.name == names_[i];
    });
    Loader loader(core, weights, names_[i], *weights_[i], piece == owned.end() ? nullptr : &*piece);
    checkpoint::Outcome quantized;
    quantized.run([&] { loader.quantize_own(); });
    verdict.agree(quantized, "weights are quantised");
    const auto most = comm.maximum(static_cast<int64_t>(loader.scales().size()), "scales");
    std::vector<float> mine(loader.scales());
    const auto count = static_cast<float>(mine.size());  // Exact: below 2^24 for any weight.
    mine.resize(static_cast<size_t>(most));
    mine.push_back(count);
    std::vector<float> all(mine.size() * static_cast<size_t>(comm.size()));
    comm.exchange(mine.data(), mine.size() * sizeof(float), all.data(), comm::make_tag("scales"));
    std::vector<float> scales;
    for (int rank = 0; rank < group; ++rank) {
      const float* of_rank = all.data() + static_cast<size_t>(rank) * mine.size();
      scales.insert(scales.end(), of_rank, of_rank + static_cast<int64_t>(of_rank[most]));
    }
    check(static_cast<int64_t>(scales.size()) == weights_[i]->scales(),
          "the ranks have not quantised all of a weight");
    loader.write_scales(std::move(scales));
  }
  core.publish();
}

}  // namespace fsdp::lora
