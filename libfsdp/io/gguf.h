// GGUF files (llama.cpp): metadata, tensors, and any range of a tensor as floats.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/io/file.h"
#include "libfsdp/io/json.h"

namespace fsdp::io {

/// Element encodings, numbered as in the file. Quantised ones store blocks of 32 or 256 elements.
enum class GgufType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kF64 = 28,
  kBF16 = 30,
};

/// How an encoding lays elements out: `block_bytes` bytes hold `block_numel` elements.
struct GgufTypeInfo {
  GgufType type;
  std::string_view name;
  int64_t block_numel;
  int64_t block_bytes;
};

/// Throws: ModelError for a number that is none of GgufType.
const GgufTypeInfo& gguf_type_info(uint32_t number);

/// Decodes whole blocks: out.size() is a multiple of block_numel, blocks.size() the bytes of as
/// many blocks.
void gguf_decode(GgufType type, std::span<const std::byte> blocks, std::span<float> out);

struct GgufTensor {
  std::string name;
  GgufType type = GgufType::kF32;
  std::vector<int64_t>
      shape;  ///< Outermost first, as PyTorch counts (the file counts the other way).
  int64_t numel = 1;
  int64_t begin = 0;  ///< Offset of the first byte in the file.
  int64_t bytes = 0;
};

/// An open GGUF file of version 2 or 3. Move-only; const use from several threads is safe.
class GgufFile {
 public:
  /// Reads metadata and the list of tensors; every length and count is compared with the bytes that
  /// are left. Throws: ModelError naming the file and the key or tensor.
  static GgufFile open(const std::string& path);

  const std::string& path() const { return file_.path(); }

  /// One object with the file's keys in order: `metadata().get<int64_t>("llama.block_count")`.
  /// Strings are bytes as stored; arrays (tokenizer.ggml.tokens) are arrays.
  const Json& metadata() const { return metadata_; }

  const std::vector<GgufTensor>& tensors() const { return tensors_; }

  /// nullptr when there is none. Cost: logarithmic.
  const GgufTensor* find(std::string_view name) const;

  /// Elements [at, at + out.size()) as floats. Reads only the blocks that hold them, at most 1 MB
  /// at a time. Throws: ModelError for a failed read; InternalError outside the tensor.
  void read(const GgufTensor& tensor, int64_t at, std::span<float> out) const;

 private:
  void parse();

  File file_;
  Json metadata_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, size_t, std::less<>> by_name_;
};

}  // namespace fsdp::io
