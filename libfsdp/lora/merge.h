// A base model and an adapter's files as one model.
#pragma once

#include <string>

#include "libfsdp/checkpoint/state_dict.h"
#include "libfsdp/io/hf_weights.h"

namespace fsdp::lora {

/// The tensors of `base` with the adapter of a PEFT directory added: W + scaling B A, DoRA's
/// magnitudes, biases and modules that were trained with it; each in its type in `base`.
///
/// Computed while it is read: memory is a few MB and one module's A and B, whatever the model's
/// size. `base` must outlive it; used by one thread. Throws: ModelError that names tensors of the
/// adapter that fit no tensor of the base, or misfit in shape; ConfigError for an adapter whose
/// init changed the base (pissa, olora), which the base's files do not show.
checkpoint::StateDict merged_state(const io::HfWeights& base, const std::string& adapter_directory);

}  // namespace fsdp::lora
