// Names of an adapter's parameters: those of PEFT, in the module and in its files.
#pragma once

#include <string>

#include "libfsdp/lora/adapters.h"

namespace fsdp::lora {

/// "<module>.lora_A.<name>.weight"; of embeddings "<module>.lora_embedding_A.<name>".
std::string a_name(const AdapterParameters& adapter, const std::string& name);
std::string b_name(const AdapterParameters& adapter, const std::string& name);
/// "<module>.lora_magnitude_vector.<name>.weight".
std::string magnitude_name(const AdapterParameters& adapter, const std::string& name);

/// The name in adapter_model.safetensors of a parameter of the model: behind "base_model.model."
/// and without the adapter's name.
std::string peft_name(const std::string& parameter, const std::string& name);

}  // namespace fsdp::lora
