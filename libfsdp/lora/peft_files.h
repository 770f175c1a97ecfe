// Adapters as PEFT's directories: adapter_config.json and adapter_model.safetensors.
#pragma once

#include <string>

#include "libfsdp/checkpoint/state_dict.h"
#include "libfsdp/lora/adapters.h"

namespace fsdp::lora {

/// The tensors of an adapter under their names in PEFT's files: A, B, magnitudes, and the biases
/// and modules that are trained with them. As model_state(). Not collective.
checkpoint::StateDict adapter_state(ShardedCore& core, const Adapters& adapters,
                                    const std::string& name = kDefaultName);

/// Writes the adapter into `directory` (made when missing): every rank its ranges of the final
/// file, which takes its name when all are done; the config last.
///
/// Collective. Throws, on all ranks: ModelError that names a tensor that is empty, or one that is
/// zero at first and has never been updated (B, gates); HostResourceError; then no file has
/// changed.
void save_adapter(ShardedCore& core, const Tuner& tuner, const std::string& directory);
void save_adapter(ShardedCore& core, const Adapters& adapters, const std::string& directory,
                  const std::string& name);

/// Fills the adapter from such a directory, each rank its own bytes; the config that it was made
/// with should be that of the directory. An embedding or a head that PEFT saved whole beside its
/// adapter ("base_layer") must be the model's.
///
/// Collective. Inits that change the model's weights must have been run before, as PEFT does.
/// Throws, on all ranks: ModelError that lists missing, unexpected and misshapen tensors, or names
/// one that is all zero as above.
void load_adapter(ShardedCore& core, const Tuner& tuner, const std::string& directory);
void load_adapter(ShardedCore& core, const Adapters& adapters, const std::string& directory,
                  const std::string& name);

}  // namespace fsdp::lora
