// The tokenizer of a GGUF file as the two files that Hugging Face's tools read.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fsdp::text {

/// The tokenizer.* metadata of a GGUF file. An id of -1 stands for an absent key.
struct GgufVocabulary {
  std::string model;                ///< tokenizer.ggml.model; only "gpt2" (byte-level BPE) is known
  std::string pre;                  ///< tokenizer.ggml.pre
  std::string chat_template;        ///< tokenizer.chat_template
  std::vector<std::string> tokens;  ///< tokenizer.ggml.tokens
  std::vector<std::string> merges;  ///< tokenizer.ggml.merges, "left right"
  std::vector<int32_t> token_types;  ///< tokenizer.ggml.token_type: 1 normal, 3 control, 4 user
                                     ///< defined, ...; or empty
  int64_t bos = -1;                  ///< tokenizer.ggml.bos_token_id
  int64_t eos = -1;                  ///< tokenizer.ggml.eos_token_id
  int64_t pad = -1;                  ///< tokenizer.ggml.padding_token_id
  int64_t unk = -1;                  ///< tokenizer.ggml.unknown_token_id
  bool add_bos = false;              ///< tokenizer.ggml.add_bos_token
};

struct GgufTokenizerTexts {
  std::string tokenizer_json;
  std::string tokenizer_config_json;
};

/// Writes the vocabulary as tokenizer.json and tokenizer_config.json. `pre` decides the
/// pre-tokenizer: smollm (digits one by one, then GPT-2's pattern), gpt-2 and default, llama-bpe
/// and its names, qwen2. Throws ModelError for another model or `pre`, tokens that are not UTF-8,
/// lists that do not fit together, or an id out of range.
GgufTokenizerTexts make_tokenizer_texts(const GgufVocabulary& vocabulary);

}  // namespace fsdp::text
