// A GGUF file of a Llama model with one layer: hidden 8, two heads of 4, one key/value head,
// feed-forward 6, vocabulary 5.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "tests/unit/io/gguf_builder.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::io {

/// What the metadata claims, right unless a test says otherwise.
struct TinyGguf {
  std::string architecture = "llama";
  std::string extra_tensor;
  uint32_t num_layers = 1;
  uint32_t feed_forward = 6;
};

/// Element (r, c) of every matrix is 100 r + c in Hugging Face's order of rows.
inline std::string write_tiny_gguf(const TempDir& dir, const TinyGguf& claims = {}) {
  struct Tensor {
    std::string name;
    uint64_t rows, columns;  // columns 0: a vector of `rows`.
  };
  std::vector<Tensor> tensors = {
      {"token_embd.weight", 5, 8},     {"blk.0.attn_norm.weight", 8, 0},
      {"blk.0.ffn_down.weight", 8, 6}, {"blk.0.ffn_gate.weight", 6, 8},
      {"blk.0.ffn_up.weight", 6, 8},   {"blk.0.ffn_norm.weight", 8, 0},
      {"blk.0.attn_k.weight", 4, 8},   {"blk.0.attn_output.weight", 8, 8},
      {"blk.0.attn_q.weight", 8, 8},   {"blk.0.attn_v.weight", 4, 8},
      {"output_norm.weight", 8, 0}};
  if (!claims.extra_tensor.empty()) tensors.push_back({claims.extra_tensor, 2, 0});
  GgufBytes bytes;
  bytes.header(tensors.size(), 10).text_key("general.architecture", claims.architecture);
  bytes.uint_key("llama.embedding_length", 8)
      .uint_key("llama.feed_forward_length", claims.feed_forward);
  bytes.uint_key("llama.block_count", claims.num_layers).uint_key("llama.attention.head_count", 2);
  bytes.uint_key("llama.attention.head_count_kv", 1).uint_key("llama.context_length", 64);
  bytes.float_key("llama.attention.layer_norm_rms_epsilon", 1e-5F)
      .float_key("llama.rope.freq_base", 1e5F);
  bytes.uint_key("tokenizer.ggml.eos_token_id", 2);
  GgufBytes data;
  for (const Tensor& tensor : tensors) {
    const std::vector<uint64_t> dims =
        tensor.columns == 0 ? std::vector{tensor.rows} : std::vector{tensor.columns, tensor.rows};
    bytes.tensor(tensor.name, dims, 0, data.str().size());
    const bool interleaved =
        tensor.name == "blk.0.attn_q.weight" || tensor.name == "blk.0.attn_k.weight";
    for (uint64_t row = 0; row < tensor.rows; ++row) {
      // Row (j, half) of a head of 4 holds what Hugging Face has in row (half, j).
      const uint64_t original = interleaved ? row / 4 * 4 + row % 2 * 2 + row % 4 / 2 : row;
      for (uint64_t c = 0; c < std::max<uint64_t>(tensor.columns, 1); ++c) {
        data.number(static_cast<float>(100 * original + c));
      }
    }
    data.pad();
  }
  return dir.write("tiny.gguf", bytes.pad().raw(data.str()).str());
}

}  // namespace fsdp::io
