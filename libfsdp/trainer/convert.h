// The command `finetune convert`: a GGUF file becomes a folder in Hugging Face format.
#pragma once

#include "libfsdp/trainer/options.h"

namespace fsdp::trainer {

/// Writes config.json, generation_config.json, the tokenizer with its chat template, and
/// model.safetensors. Memory: one tensor's part of a few MB. Throws: ModelError, ConfigError
/// (target), HostResourceError.
void run_convert(const ConvertOptions& options);

}  // namespace fsdp::trainer
