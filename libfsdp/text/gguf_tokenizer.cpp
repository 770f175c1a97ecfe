#include "libfsdp/text/gguf_tokenizer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>

#include "libfsdp/base/error.h"
#include "libfsdp/text/bpe.h"
#include "libfsdp/text/unicode.h"

namespace fsdp::text {
namespace {

using Json = nlohmann::ordered_json;

constexpr int32_t kControlToken = 3;
constexpr int32_t kUserDefinedToken = 4;

constexpr const char* kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// How the text is cut before the merges, by the name in tokenizer.ggml.pre.
struct Flavour {
  Json normalizer;
  Json pre_tokenizer;
  bool ignore_merges = false;
};

Json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

Json sequence(const char* key, std::initializer_list<Json> parts) {
  Json list = Json::array();
  for (const Json& part : parts) list.push_back(part);
  Json out;
  out["type"] = "Sequence";
  out[key] = std::move(list);
  return out;
}

Json split(const char* pattern) {
  Json out;
  out["type"] = "Split";
  out["pattern"]["Regex"] = pattern;
  out["behavior"] = "Isolated";
  out["invert"] = false;
  return out;
}

Flavour flavour_of(const std::string& pre) {
  const auto is_one_of = [&](std::initializer_list<std::string_view> names) {
    return std::find(names.begin(), names.end(), pre) != names.end();
  };
  if (pre == "smollm") {
    const Json digits = {{"type", "Digits"}, {"individual_digits", true}};
    return {nullptr, sequence("pretokenizers", {digits, byte_level(true)}), false};
  }
  if (is_one_of({"", "default", "gpt-2", "gpt2"})) return {nullptr, byte_level(true), false};
  if (is_one_of({"llama-bpe", "llama3", "llama-v3"})) {
    return {nullptr, sequence("pretokenizers", {split(kLlama3Pattern), byte_level(false)}), true};
  }
  if (is_one_of({"qwen2", "deepseek-r1-qwen"})) {
    return {{{"type", "NFC"}},
            sequence("pretokenizers", {split(kQwen2Pattern), byte_level(false)}),
            false};
  }
  throw ModelError(cat("[gguf] tokenizer.ggml.pre is '", pre,
                       "'; libfsdp knows smollm, gpt-2, default, llama-bpe and qwen2. Hint: take "
                       "tokenizer.json from the "
                       "model's Hugging Face files."));
}

void check_id(const GgufVocabulary& vocabulary, int64_t id, const char* key) {
  if (id < -1 || id >= static_cast<int64_t>(vocabulary.tokens.size())) {
    throw ModelError(
        cat("[gguf] ", key, " is ", id, ", but there are ", vocabulary.tokens.size(), " tokens."));
  }
}

void check_utf8(const std::string& text, const char* key, size_t index) {
  if (unicode::first_invalid(text) != std::string_view::npos) {
    throw ModelError(cat("[gguf] ", key, "[", index, "] is not UTF-8."));
  }
}

void check_vocabulary(const GgufVocabulary& vocabulary) {
  if (vocabulary.model != "gpt2") {
    throw ModelError(cat("[gguf] tokenizer.ggml.model is '", vocabulary.model,
                         "'; libfsdp reads 'gpt2' (byte-level BPE)."));
  }
  const size_t n = vocabulary.tokens.size();
  if (n == 0 || static_cast<int64_t>(n) > kMaxTokenIds) {
    throw ModelError(cat("[gguf] tokenizer.ggml.tokens holds ", n, " tokens; expected 1 to ",
                         kMaxTokenIds, "."));
  }
  if (!vocabulary.token_types.empty() && vocabulary.token_types.size() != n) {
    throw ModelError(
        cat("[gguf] ", vocabulary.token_types.size(), " token types for ", n, " tokens."));
  }
  for (size_t i = 0; i < n; ++i) check_utf8(vocabulary.tokens[i], "tokenizer.ggml.tokens", i);
  for (size_t i = 0; i < vocabulary.merges.size(); ++i)
    check_utf8(vocabulary.merges[i], "tokenizer.ggml.merges", i);
  if (unicode::first_invalid(vocabulary.chat_template) != std::string_view::npos) {
    throw ModelError("[gguf] tokenizer.chat_template is not UTF-8.");
  }
  check_id(vocabulary, vocabulary.bos, "bos_token_id");
  check_id(vocabulary, vocabulary.eos, "eos_token_id");
  check_id(vocabulary, vocabulary.pad, "padding_token_id");
  check_id(vocabulary, vocabulary.unk, "unknown_token_id");
}

Json added_tokens(const GgufVocabulary& vocabulary) {
  Json list = Json::array();
  const auto is_named = [&](size_t i) {
    const auto id = static_cast<int64_t>(i);
    return id == vocabulary.bos || id == vocabulary.eos || id == vocabulary.pad ||
           id == vocabulary.unk;
  };
  for (size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    const int32_t type = vocabulary.token_types.empty() ? 0 : vocabulary.token_types[i];
    const bool special = type == kControlToken || is_named(i);
    if ((!special && type != kUserDefinedToken) || vocabulary.tokens[i].empty()) continue;
    list.push_back({{"id", i},
                    {"content", vocabulary.tokens[i]},
                    {"single_word", false},
                    {"lstrip", false},
                    {"rstrip", false},
                    {"normalized", false},
                    {"special", special}});
  }
  return list;
}

Json post_processor(const GgufVocabulary& vocabulary) {
  if (!vocabulary.add_bos || vocabulary.bos < 0) {
    return {{"type", "ByteLevel"},
            {"add_prefix_space", true},
            {"trim_offsets", false},
            {"use_regex", true}};
  }
  const std::string& bos = vocabulary.tokens[static_cast<size_t>(vocabulary.bos)];
  const auto special = [&](int type) {
    return Json{{"SpecialToken", {{"id", bos}, {"type_id", type}}}};
  };
  const auto text = [](const char* id, int type) {
    return Json{{"Sequence", {{"id", id}, {"type_id", type}}}};
  };
  Json out;
  out["type"] = "TemplateProcessing";
  out["single"] = Json::array({special(0), text("A", 0)});
  out["pair"] = Json::array({special(0), text("A", 0), special(1), text("B", 1)});
  Json entry;
  entry["id"] = bos;
  entry["ids"] = Json::array({vocabulary.bos});
  entry["tokens"] = Json::array({bos});
  out["special_tokens"][bos] = std::move(entry);
  return out;
}

// Written by hand: nlohmann's ordered object looks through all its keys for each new one.
std::string model_text(const GgufVocabulary& vocabulary, bool ignore_merges) {
  std::string out =
      cat(R"({"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,)",
          R"("end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":)",
          ignore_merges ? "true" : "false", ",\n\"vocab\":{");
  for (size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    out += cat(i == 0 ? "\n" : ",\n", Json(vocabulary.tokens[i]).dump(), ':', i);
  }
  out += "},\n\"merges\":[";
  for (size_t i = 0; i < vocabulary.merges.size(); ++i) {
    out += cat(i == 0 ? "\n" : ",\n", Json(vocabulary.merges[i]).dump());
  }
  return out + "]}";
}

std::string config_text(const GgufVocabulary& vocabulary) {
  Json config;
  config["add_prefix_space"] = false;
  const auto name = [&](const char* key, int64_t id) {
    if (id >= 0) config[key] = vocabulary.tokens[static_cast<size_t>(id)];
  };
  name("bos_token", vocabulary.bos);
  name("eos_token", vocabulary.eos);
  name("pad_token", vocabulary.pad);
  name("unk_token", vocabulary.unk);
  if (!vocabulary.chat_template.empty()) config["chat_template"] = vocabulary.chat_template;
  config["clean_up_tokenization_spaces"] = false;
  // The class that takes tokenizer.json as it is; the classes of models build their own
  // pre-tokenizer.
  config["tokenizer_class"] = "PreTrainedTokenizerFast";
  return config.dump(2) + "\n";
}

}  // namespace

GgufTokenizerTexts make_tokenizer_texts(const GgufVocabulary& vocabulary) {
  check_vocabulary(vocabulary);
  const Flavour flavour = flavour_of(vocabulary.pre);
  std::string text = "{\n\"version\":\"1.0\",\n\"truncation\":null,\n\"padding\":null";
  const auto put = [&](const char* key, const std::string& value) {
    text += cat(",\n\"", key, "\":", value);
  };
  put("added_tokens", added_tokens(vocabulary).dump());
  put("normalizer", flavour.normalizer.dump());
  put("pre_tokenizer", flavour.pre_tokenizer.dump());
  put("post_processor", post_processor(vocabulary).dump());
  put("decoder", byte_level(true).dump());
  put("model", model_text(vocabulary, flavour.ignore_merges));
  return {text + "\n}\n", config_text(vocabulary)};
}

}  // namespace fsdp::text
