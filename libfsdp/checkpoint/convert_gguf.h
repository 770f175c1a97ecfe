// A GGUF file as a state.
#pragma once

#include <memory>

#include "libfsdp/checkpoint/state_dict.h"
#include "libfsdp/io/gguf_llama.h"

namespace fsdp::checkpoint {

/// The tensors of a Llama GGUF file under their names in Hugging Face's files, as a state of one
/// rank: float32, decoded as they are read. Not to be written.
StateDict gguf_state(const std::shared_ptr<const io::GgufLlama>& model);

}  // namespace fsdp::checkpoint
