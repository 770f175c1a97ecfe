// Frozen weights of linear layers in 4 or 8 bits: kept, gathered and read as packed bytes (QLoRA).
//
//   fsdp::lora::Adapters adapters(*model, config);            // On meta.
//   fsdp::lora::QuantizedWeights quantized(*model, {});       // Behind the adapters.
//   auto sharded = fsdp::fully_shard(model, comm, adapters.shard_options(options));
//   load_weights(sharded.core(), weights, quantized.file_names(), quantized.left_out());
//   quantized.load(sharded.core(), weights);
//   adapters.initialize(sharded.core(), seed);
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "libfsdp/checkpoint/quantized_tensors.h"
#include "libfsdp/io/hf_weights.h"
#include "libfsdp/lora/packed_weight.h"
#include "libfsdp/lora/target.h"
#include "libfsdp/shard/sharded_core.h"

namespace fsdp::lora {

struct QuantizationOptions {
  PackedFormat format = PackedFormat::kNf4;
  int64_t blocksize = 64;     ///< Elements that share a scale; of 4-bit formats.
  bool double_quant = false;  ///< Scales in 8 bits too; of 4-bit formats.
  /// Modules that stay as they are: full names, or their ends.
  std::vector<std::string> skip_modules = {"lm_head"};
};

class QuantizedWeights {
 public:
  /// Makes the weight of every Linear target of `model`, LibTorch's own too, a parameter of packed
  /// bytes; it drops what values it has. Before fully_shard(), behind Adapters. Throws ConfigError
  /// for a weight that is trained (what is quantised cannot be), for sizes that do not fit, when
  /// there is no Linear.
  QuantizedWeights(torch::nn::Module& model, QuantizationOptions options);
  /// The same for the weights that the model's files hold quantised, each as it is there. Throws
  /// ConfigError for a weight that is trained, ModelError for one that is no Linear's.
  QuantizedWeights(torch::nn::Module& model, const checkpoint::QuantizedWeights& stored);

  /// Fills the packed weights. From 16- or 32-bit files each rank quantises its own elements, and
  /// the ranks tell each other the scales; of quantised files each reads its own bytes. Collective.
  /// Memory: a buffer of some MB, and the scales of one weight. Throws: ModelError (missing,
  /// misshapen, not finite), on all ranks.
  void load(ShardedCore& core, const io::HfWeights& weights) const;

  /// For load_weights(): names of the tensors that hold the packed weights in the files, and
  /// whether a parameter is one of them or of an adapter.
  const std::vector<std::string>& file_names() const { return file_names_; }
  std::function<bool(const std::string&)> left_out() const;
  /// Bytes of all packed weights, and elements.
  int64_t bytes() const;
  int64_t numel() const;

 private:
  void pack(const TargetLayer& target, const std::string& module, const PackedWeight& packed);

  std::optional<QuantizationOptions> options_;  // Empty = the files are quantised.
  std::vector<std::string> names_, file_names_;
  std::vector<std::shared_ptr<const PackedWeight>> weights_;  // By name.
};

}  // namespace fsdp::lora
