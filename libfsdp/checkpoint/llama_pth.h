// The files in which Meta publishes Llama: params.json and consolidated.NN.pth.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "libfsdp/checkpoint/stored_reader.h"
#include "libfsdp/io/hf_config.h"

namespace fsdp::checkpoint {

struct LlamaPth {
  io::HfModelConfig config;  ///< What params.json and the tensors' shapes say, as config.json.
  StateDict state;           ///< All tensors under Hugging Face's names, in their order.
};

/// Are there files consolidated.NN.pth?
bool is_llama_pth(const std::string& directory);

/// Opens them: the model-parallel parts are put together, and the rows of q_proj and k_proj come in
/// the order that Hugging Face's rotary embedding expects (halves instead of pairs).
///
/// The pickles are read in a child process (torch_files.h); values are read when the state is.
/// Memory: nothing that grows with the model but names. Throws: ModelError.
LlamaPth open_llama_pth(const std::string& directory);

}  // namespace fsdp::checkpoint
