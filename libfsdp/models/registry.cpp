#include "libfsdp/models/registry.h"

namespace fsdp::models {

LlamaForCausalLM make_causal_lm(const LlamaConfig& config, const at::TensorOptions& options) {
  return LlamaForCausalLM(config, options);
}

}  // namespace fsdp::models
