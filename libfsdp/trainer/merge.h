// The command `finetune merge`: a base model and an adapter as one model.
#pragma once

#include "libfsdp/trainer/options.h"

namespace fsdp::trainer {

/// Writes the base with the adapter merged in, in the base's type (also of 4 and 8 bits, unless
/// they are to be dequantised), with config.json and the tokenizer's files. Memory: as
/// lora::merged_state(). Files have their names only when all of them are written. Throws:
/// ModelError, ConfigError, HostResourceError.
void run_merge(const MergeOptions& options);

}  // namespace fsdp::trainer
