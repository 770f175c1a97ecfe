// What defines a model of the Llama family: Llama 2/3.x, Mistral, Qwen2/2.5 and Qwen3 are one block
// with flags.
#pragma once

#include "libfsdp/io/hf_config.h"

namespace fsdp::models {

/// Read from a config.json, or filled in by hand.
using LlamaConfig = io::HfModelConfig;
using RopeConfig = io::RopeConfig;

/// Throws ModelError when sizes are not positive, KV heads do not divide the heads, or head_dim is
/// odd: for configurations made by hand, a file's are checked when it is read.
void validate(const LlamaConfig& config);

}  // namespace fsdp::models
