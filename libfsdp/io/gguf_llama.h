// A Llama model in a GGUF file, seen under the names and in the layout of Hugging Face.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "libfsdp/io/gguf.h"
#include "libfsdp/io/hf_config.h"

namespace fsdp::io {

class GgufLlama {
 public:
  /// Receives elements [at, at + values.size()) of a tensor.
  using Sink = std::function<void(int64_t at, std::span<const float> values)>;

  /// Opens the file, derives the configuration, and checks that every tensor is there in its shape.
  /// Throws: ModelError, also for an architecture other than llama and for rotary scaling that GGUF
  /// hides in tensors.
  static GgufLlama open(const std::string& path);

  const GgufFile& file() const { return file_; }

  /// As config.json would say it; `config().source` is that document.
  const HfModelConfig& config() const { return config_; }

  /// generation_config.json: the special tokens.
  Json generation_config() const;

  /// A tensor of config().expected_tensors(), from front to back in parts of at most a few MB (one
  /// head of q and k, whose rows llama.cpp interleaves and this puts back). Throws: ModelError;
  /// InternalError for an unknown name.
  void read(const std::string& hf_name, const Sink& sink) const;

 private:
  GgufLlama(GgufFile file, HfModelConfig config)
      : file_(std::move(file)), config_(std::move(config)) {}
  void check_tensors() const;
  void read_interleaved(const GgufTensor& tensor, const Sink& sink) const;

  GgufFile file_;
  HfModelConfig config_;
};

/// "model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight". Throws: InternalError for a name
/// that has none.
std::string gguf_name(const std::string& hf_name);

}  // namespace fsdp::io
