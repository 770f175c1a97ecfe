// Adapters and quantised weights of a model, as options ask for them.
#pragma once

#include <optional>
#include <string>

#include "libfsdp/lora/adapters.h"
#include "libfsdp/lora/quantized.h"
#include "libfsdp/models/llama.h"
#include "libfsdp/trainer/options.h"

namespace fsdp::trainer {

/// What a model has beside its base.
struct ModelParts {
  std::optional<lora::Adapters> adapters;
  std::optional<lora::QuantizedWeights> quantized;
};

/// What the options mean, or the config of the adapter that they name; `base`: where the model is,
/// for the adapter's files. Throws: ConfigError, ModelError.
lora::LoraConfig lora_config(const PeftOptions& options, const std::string& base);

/// Gives a model on meta its parts. Throws: ConfigError (targets), ModelError (the adapter's
/// files).
ModelParts add_parts(models::LlamaForCausalLMImpl& model, const PeftOptions& options,
                     const std::string& base);

/// First values of the adapters, or those of the folder that the options name; after the base has
/// been loaded. Collective.
void fill_adapters(ShardedCore& core, ModelParts& parts, const PeftOptions& options, uint64_t seed);

/// "trainable params: 1,234 || all params: 5,678 || trainable%: 21.7330", as PEFT says it.
std::string trainable_line(const ShardedCore& core, const ModelParts& parts);

}  // namespace fsdp::trainer
