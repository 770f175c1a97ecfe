// From a configuration to a model.
#pragma once

#include <c10/core/TensorOptions.h>

#include "libfsdp/models/llama.h"

namespace fsdp::models {

/// Builds the model that `config` describes (on the meta device if `options` say so).
LlamaForCausalLM make_causal_lm(const LlamaConfig& config, const at::TensorOptions& options = {});

}  // namespace fsdp::models
