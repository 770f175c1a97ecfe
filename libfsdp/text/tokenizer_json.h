// Reads tokenizer.json into the parts that a Tokenizer runs.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "libfsdp/text/added_tokens.h"
#include "libfsdp/text/bpe.h"
#include "libfsdp/text/pre_tokenizer.h"
#include "libfsdp/text/tokenizer_decoder.h"
#include "libfsdp/text/tokenizer_normalizer.h"

namespace fsdp::text {

/// What a TemplateProcessing puts around the tokens of a text.
struct TokenTemplate {
  struct Item {
    bool is_text = false;      ///< the text's tokens stand here
    std::vector<int32_t> ids;  ///< otherwise these
  };
  std::vector<Item> items;
};

/// A tokenizer.json, ready to run. normalizer, pre_tokenizer and decoder may be null.
struct TokenizerParts {
  std::unique_ptr<Normalizer> normalizer;
  std::unique_ptr<PreTokenizer> pre_tokenizer;
  std::unique_ptr<Bpe> model;
  std::unique_ptr<AddedTokens> added;
  std::vector<TokenTemplate> templates;  ///< applied one after the other
  std::unique_ptr<TokenDecoder> decoder;
};

/// `where` names the file in errors. Throws ModelError for a document that is malformed, or that
/// uses a component or an option that libfsdp does not have; the text names the path in the
/// document. `truncation` and `padding` are ignored, as transformers does.
TokenizerParts parse_tokenizer_json(std::string_view json, std::string_view where);

/// The texts beside tokenizer.json that matter here. Missing documents are empty strings.
struct TokenizerConfigTexts {
  std::string_view tokenizer_config;    ///< tokenizer_config.json
  std::string_view special_tokens_map;  ///< special_tokens_map.json
  std::string_view generation_config;   ///< generation_config.json
  std::string_view chat_template;       ///< chat_template.jinja; wins over tokenizer_config.json
};

struct TokenizerConfig {
  std::string bos_token, eos_token, pad_token, unk_token;  ///< empty when not named
  std::vector<int32_t> generation_eos_ids;
  std::string chat_template;
};

/// Throws ModelError for a malformed document.
TokenizerConfig parse_tokenizer_config(const TokenizerConfigTexts& texts, std::string_view where);

}  // namespace fsdp::text
