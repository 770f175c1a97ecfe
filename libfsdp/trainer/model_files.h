// A model's folder, checked as a whole before any work: configuration, weights' headers, tokenizer.
#pragma once

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/checkpoint/quantized_tensors.h"
#include "libfsdp/io/hf_config.h"
#include "libfsdp/io/hf_weights.h"
#include "libfsdp/text/tokenizer.h"

namespace fsdp::trainer {

struct ModelFiles {
  std::filesystem::path directory;
  io::HfModelConfig config;
  text::Tokenizer tokenizer;
  DType dtype = DType::kF32;               ///< Of the stored weights (of their first tensor).
  int64_t parameters = 0;                  ///< Elements of all tensors.
  checkpoint::QuantizedWeights quantized;  ///< Those that the files hold in 4 or 8 bits.
};

/// Reads and checks everything but the weights' values.
/// Throws: ModelError for a missing folder or file, a tensor that is missing, unknown or of another
/// shape or quantisation than config.json says, a damaged file, a tokenizer with ids that the model
/// has no row for.
ModelFiles open_model(const std::filesystem::path& directory);

/// Copies generation_config.json, when the source has one; writes config.json with `dtype`, and the
/// tokenizer's files. Each file is written aside and renamed. Throws: HostResourceError.
void save_model_files(const ModelFiles& model, DType dtype, const std::filesystem::path& directory);

/// The same files as texts: (name, content).
std::vector<std::pair<std::string, std::string>> model_texts(const ModelFiles& model, DType dtype);

/// Makes `directory`, or accepts an empty one; with `overwrite` any. Throws: ConfigError when it
/// has content, or cannot be made; HostResourceError when its disk has less than `needed_bytes`
/// free.
void prepare_output_dir(const std::filesystem::path& directory, bool overwrite,
                        int64_t needed_bytes);

}  // namespace fsdp::trainer
