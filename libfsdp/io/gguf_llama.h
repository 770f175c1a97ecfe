// A Llama model in a GGUF file, seen under the names and in the layout of Hugging Face.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "libfsdp/io/gguf.h"
#include "libfsdp/io/hf_config.h"

namespace fsdp::io {

class GgufLlama {
 public:
  /// Opens the file, derives the configuration, and checks that every tensor is there in its shape.
  /// Throws: ModelError, also for an architecture other than llama and for rotary scaling that GGUF
  /// hides in tensors.
  static GgufLlama open(const std::string& path);

  const GgufFile& file() const { return file_; }

  /// As config.json would say it; `config().source` is that document.
  const HfModelConfig& config() const { return config_; }

  /// generation_config.json: the special tokens.
  Json generation_config() const;

  /// Elements [at, at + out.size()) of a tensor of config().expected_tensors(). (The rows of a head
  /// of q and k, which llama.cpp interleaves, are put back.) Throws: ModelError; InternalError for
  /// an unknown name or elements outside the tensor.
  void read(const std::string& hf_name, int64_t at, std::span<float> out) const;

 private:
  GgufLlama(GgufFile file, HfModelConfig config)
      : file_(std::move(file)), config_(std::move(config)) {}
  void check_tensors() const;
  void read_interleaved(const GgufTensor& tensor, int64_t at, std::span<float> out) const;

  GgufFile file_;
  HfModelConfig config_;
};

/// "model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight". Throws: InternalError for a name
/// that has none.
std::string gguf_name(const std::string& hf_name);

}  // namespace fsdp::io
