// The command `finetune convert`: models and checkpoints from one format to another.
#pragma once

#include "libfsdp/trainer/options.h"

namespace fsdp::trainer {

/// Writes the tensors of `from` in the wanted format and type, with config.json, the tokenizer and
/// what else belongs to a model, as far as the source has them. Memory: buffers of a few MB,
/// whatever the size. Files have their names only when all of them are written.
/// Throws: ModelError, ConfigError (target), HostResourceError.
void run_convert(const ConvertOptions& options);

}  // namespace fsdp::trainer
