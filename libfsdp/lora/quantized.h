// Frozen weights of linear layers in 4 or 8 bits: kept, gathered and read as packed bytes (QLoRA).
//
//   fsdp::lora::Adapters adapters(*model, config);            // On meta.
//   fsdp::lora::QuantizedWeights quantized(*model, {});       // Behind the adapters.
//   auto sharded = fsdp::fully_shard(model, comm, adapters.shard_options(options));
//   load_weights(sharded.core(), weights, quantized.names(), quantized.left_out());
//   quantized.load(sharded.core(), weights);
//   adapters.initialize(sharded.core(), seed);
#pragma once

#include <torch/nn/module.h>

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "libfsdp/io/hf_weights.h"
#include "libfsdp/lora/packed_weight.h"
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

  /// Fills the packed weights from 16- or 32-bit files: each rank quantises its own elements, and
  /// the ranks tell each other the scales. Collective. Memory: a buffer of some MB, and the scales
  /// of one weight. Throws: ModelError (missing, misshapen, not finite), on all ranks.
  void load(ShardedCore& core, const io::HfWeights& weights) const;

  /// Names of the packed parameters, and whether a parameter is one of them or of an adapter: for
  /// load_weights().
  const std::vector<std::string>& names() const { return names_; }
  std::function<bool(const std::string&)> left_out() const;
  /// Bytes of all packed weights, and elements.
  int64_t bytes() const;
  int64_t numel() const;

 private:
  std::vector<std::string> names_;
  std::vector<std::shared_ptr<const PackedWeight>> weights_;  // By name.
};

}  // namespace fsdp::lora
