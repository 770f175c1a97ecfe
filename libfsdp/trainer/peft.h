// Adapters and quantised weights of a model, as options ask for them.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "libfsdp/lora/quantized.h"
#include "libfsdp/lora/tuner.h"
#include "libfsdp/models/llama.h"
#include "libfsdp/trainer/model_files.h"
#include "libfsdp/trainer/options.h"

namespace fsdp::trainer {

/// What a model has beside its base.
struct ModelParts {
  std::shared_ptr<lora::Tuner> adapters;
  std::optional<lora::QuantizedWeights> quantized;
};

/// Whether the options can be had with this folder. Throws: ConfigError where they ask for another
/// quantisation than its own, or to train what is quantised.
void check_base(const ModelFiles& files, const PeftOptions& options, bool trains);

/// Gives a model on meta the parts that the options, or the adapter's folder that they name, ask
/// for. `trained`: whether they will be. Throws: ConfigError (targets, sizes, as check_base()),
/// ModelError (the adapter's files).
ModelParts add_parts(models::LlamaForCausalLMImpl& model, const PeftOptions& options,
                     const ModelFiles& files, bool trained);
/// Tokens in front of every sequence that an adapter's folder has, if it is one of prefix tuning.
/// Throws: ModelError.
int64_t prefix_tokens(const std::filesystem::path& adapter);
/// Throws for options that add_parts() would refuse whatever the model is.
void check_adapter(const PeftOptions& options);

/// Freezes what the options say. Throws: ConfigError (nothing is chosen, or nothing left to train).
void freeze_parts(models::LlamaForCausalLMImpl& model, const FreezeOptions& options);

/// First values of the adapters, or those of the folder that the options name; after the base has
/// been loaded. Collective.
void fill_adapters(ShardedCore& core, ModelParts& parts, const PeftOptions& options, uint64_t seed);

/// "trainable params: 1,234 || all params: 5,678 || trainable%: 21.7330", as PEFT says it.
std::string trainable_line(const ShardedCore& core, const ModelParts& parts);

}  // namespace fsdp::trainer
