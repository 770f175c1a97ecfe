// The command `finetune new-model`: random weights from a configuration.
#pragma once

#include "libfsdp/trainer/options.h"

namespace fsdp::trainer {

/// Writes config.json, model.safetensors with weights that are a function of (seed, name, place),
/// and the tokenizer's files. Memory: the largest tensor. Throws: ModelError, ConfigError,
/// HostResourceError.
void run_new_model(const NewModelOptions& options);

}  // namespace fsdp::trainer
