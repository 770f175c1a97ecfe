// From a GGUF file to a Hugging Face model directory.
#pragma once

#include <string>

#include "libfsdp/base/dtype.h"
#include "libfsdp/io/gguf_llama.h"
#include "libfsdp/io/hf_weights.h"

namespace fsdp::checkpoint {

/// Writes weights, config.json and generation_config.json of a Llama GGUF file into `out_directory`
/// (made when missing), the configuration last. The tokenizer's files are the caller's business.
///
/// Memory: one part of a tensor at a time. Cost: one pass over the file.
/// Throws: ModelError for the source, ConfigError or HostResourceError for the directory; then
/// parts of the weights may be there (StagedDirectory is for that), but no config.json.
void convert_gguf(const io::GgufLlama& model, const std::string& out_directory, DType dtype,
                  int64_t max_file_bytes = io::kDefaultMaxShardBytes);

}  // namespace fsdp::checkpoint
