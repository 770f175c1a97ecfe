// A tokenizer.json small enough to reason about: all bytes, a few merges, two added tokens.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "libfsdp/base/error.h"
#include "libfsdp/text/bpe.h"
#include "libfsdp/text/tokenizer.h"
#include "libfsdp/text/unicode.h"

namespace fsdp::text {

using Json = nlohmann::json;

/// Bytes are ids 0 to 255, then "he" 256, "ll" 257, "hell" 258, "hello" 259, "Ġw" 260, and the
/// added tokens <s> 261,
/// <|end|> 262.
inline Json tiny_tokenizer() {
  Json vocabulary = Json::object();
  for (int byte = 0; byte < 256; ++byte) {
    std::string token;
    unicode::append(token, byte_level_character(static_cast<uint8_t>(byte)));
    vocabulary[token] = byte;
  }
  int next = 256;
  for (const char* word : {"he", "ll", "hell", "hello", "Ġw"}) vocabulary[word] = next++;
  const auto added = [](int id, const char* content) {
    return Json{{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
                {"rstrip", false}, {"normalized", false}, {"special", true}};
  };
  const Json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", false},
                           {"use_regex", true}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", {added(261, "<s>"), added(262, "<|end|>")}},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor", nullptr},
          {"decoder", byte_level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"vocab", vocabulary},
            {"merges", {"h e", "l l", "he ll", "hell o", "Ġ w"}}}}};
}

/// A folder that goes away with the test.
class ScratchFolder {
 public:
  explicit ScratchFolder(const std::string& name)
      : path_(std::filesystem::temp_directory_path() / cat("fsdp_", name, "_", ::getpid())) {
    std::filesystem::create_directories(path_);
  }
  ~ScratchFolder() { std::filesystem::remove_all(path_); }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(path_ / name, std::ios::binary) << text;
  }
  std::string read(const std::string& name) const {
    std::ifstream in(path_ / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

 private:
  std::filesystem::path path_;
};

}  // namespace fsdp::text
