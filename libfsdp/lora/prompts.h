// Tokens that are trained in the place of weights: prefix tuning and llama-adapter, as PEFT has
// them.
//
//   fsdp::lora::PrefixTuning prefix(*model, {.num_virtual_tokens = 30});
//   auto sharded = fsdp::fully_shard(model, comm, prefix.shard_options(options));
//   ... load the model's weights ...
//   prefix.initialize(sharded.core(), seed);
#pragma once

#include <torch/nn/module.h>

#include <memory>
#include <string>
#include <vector>

#include "libfsdp/lora/config_fields.h"
#include "libfsdp/lora/prompt_target.h"
#include "libfsdp/lora/tuner.h"

namespace fsdp::lora {

struct PrefixConfig {
  int64_t num_virtual_tokens = 30;
  /// Train embeddings of the tokens and two layers that make the prefix of them.
  bool prefix_projection = false;
  int64_t encoder_hidden_size = 0;  ///< Between these layers; 0 = as wide as a layer's keys.
  PeftNotes notes;

  /// What a file says of the model; 0 = nothing.
  int64_t num_layers = 0;
  int64_t num_attention_heads = 0;  ///< Of keys and values.
  int64_t token_dim = 0;            ///< Width of a layer's keys.
  /// Of a file: a projection made the prefix. PEFT's files hold the prefix alone, which can be
  /// used.
  bool projected = false;
};

/// Prefix tuning: keys and values that every layer's attention sees in front of every sequence.
class PrefixTuning : public Tuner {
 public:
  /// Freezes `model`, one module of which must be a PrefixTarget, and gives it a prefix: parameters
  /// `prompt_encoder.embedding.weight` and, of a projection, `prompt_encoder.transform.*`. Before
  /// fully_shard(). `model` must outlive it. Throws ConfigError: no such module, another prefix, a
  /// config that does not fit.
  PrefixTuning(torch::nn::Module& model, PrefixConfig config);

  /// Without it the model computes as before. Not inside a step.
  void set_active(bool active);
  const PrefixConfig& config() const { return config_; }

  ShardOptions shard_options(ShardOptions options) const override { return options; }
  void initialize(ShardedCore& core, uint64_t seed) override;
  std::string config_text() const override;
  checkpoint::StateDict state(ShardedCore& core) const override;
  /// Of a projection: what it makes; this cannot be loaded into one.
  checkpoint::StateDict files(ShardedCore& core) const override;

 private:
  PrefixTarget* target_ = nullptr;
  PrefixConfig config_;
  PrefixShape shape_;
  Prefix prefix_;
  std::vector<std::pair<std::string, int64_t>> parameters_;  // Names, and inputs of a layer or 0.
};

struct LlamaAdapterConfig {
  int64_t adapter_len = 10;     ///< Tokens of a layer.
  int64_t adapter_layers = 30;  ///< The last so many layers have them.
  PeftNotes notes;
};

/// Llama-adapter: tokens that attention attends to on the side, added through a gate that begins at
/// zero.
class LlamaAdapter : public Tuner {
 public:
  /// Freezes `model`, and gives the last of its AdaptionTargets parameters
  /// `<module>.adaption_prompt` and `<module>.adaption_gate`. As PrefixTuning.
  LlamaAdapter(torch::nn::Module& model, LlamaAdapterConfig config);

  void set_active(bool active);
  const LlamaAdapterConfig& config() const { return config_; }

  ShardOptions shard_options(ShardOptions options) const override;
  void initialize(ShardedCore& core, uint64_t seed) override;
  std::string config_text() const override;
  checkpoint::StateDict state(ShardedCore& core) const override;

 private:
  struct Layer {
    std::string module;
    AdaptionTarget* target = nullptr;
    AdaptionPrompt prompt;
  };
  LlamaAdapterConfig config_;
  std::vector<Layer> layers_;
};

/// "adapter_config.json" of a PEFT directory. Throws ModelError for another kind, and by its name
/// for a field that changes what is computed and is not supported.
PrefixConfig read_prefix_config(const std::string& directory);
LlamaAdapterConfig read_llama_adapter_config(const std::string& directory);

}  // namespace fsdp::lora
