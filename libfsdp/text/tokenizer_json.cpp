#include "libfsdp/text/tokenizer_json.h"

#include <simdjson.h>

#include <algorithm>
#include <string>

#include "libfsdp/base/error.h"
#include "libfsdp/text/unicode.h"

namespace fsdp::text {
namespace {

// A checked view of a JSON document: every access names its path in errors, duplicate keys are
// refused.
class JsonNode {
 public:
  JsonNode(simdjson::dom::element value, std::string path)
      : value_(value), path_(std::move(path)) {}

  const std::string& path() const { return path_; }
  bool is_object() const { return value_.is_object(); }
  bool is_array() const { return value_.is_array(); }
  bool is_string() const { return value_.is_string(); }
  bool is_integer() const { return value_.is_int64(); }

  [[noreturn]] void fail(std::string_view what) const {
    throw ModelError(cat("[tokenizer] ", path_, ": ", what));
  }

  simdjson::dom::object object() const { return typed<simdjson::dom::object>("an object"); }
  simdjson::dom::array array() const { return typed<simdjson::dom::array>("an array"); }
  std::string_view string() const { return typed<std::string_view>("a string"); }
  bool boolean() const { return typed<bool>("true or false"); }

  int64_t integer(int64_t low, int64_t high) const {
    const auto value = typed<int64_t>("an integer");
    if (value < low || value > high)
      fail(cat("got ", value, ", expected ", low, " to ", high, "."));
    return value;
  }

  std::vector<JsonNode> items() const {
    std::vector<JsonNode> out;
    for (const auto item : array()) {
      out.emplace_back(item, cat(path_, "[", out.size(), "]"));
    }
    return out;
  }

  /// The member, or nothing when it is missing or null.
  std::optional<JsonNode> find(std::string_view key) const {
    std::optional<JsonNode> found;
    for (const auto field : object()) {
      if (field.key != key) continue;
      if (found) fail(cat("the key '", key, "' is there twice."));
      found.emplace(field.value, cat(path_, ".", key));
    }
    return found && found->value_.is_null() ? std::nullopt : found;
  }

  JsonNode at(std::string_view key) const {
    auto found = find(key);
    if (!found) fail(cat("'", key, "' is missing."));
    return *std::move(found);
  }

  bool boolean_or(std::string_view key, bool otherwise) const {
    const auto found = find(key);
    return found ? found->boolean() : otherwise;
  }

 private:
  template <class T>
  T typed(std::string_view expected) const {
    T value;
    if (value_.get(value) != simdjson::SUCCESS) fail(cat("expected ", expected, "."));
    return value;
  }

  simdjson::dom::element value_;
  std::string path_;
};

/// A parsed document; its nodes live as long as it does.
class JsonDocument {
 public:
  /// Throws ModelError when `json` is not one JSON document, or nests deeper than 64.
  JsonDocument(std::string_view json, std::string_view where) : where_(where) {
    constexpr size_t kMaxDepth = 64;
    auto error = parser_.allocate(std::max<size_t>(json.size(), 64), kMaxDepth);
    simdjson::dom::element root;
    if (!error) error = parser_.parse(json.data(), json.size(), true).get(root);
    if (error)
      throw ModelError(
          cat("[tokenizer] ", where, " is not valid JSON: ", simdjson::error_message(error)));
    root_ = root;
  }
  JsonNode root() const { return {root_, where_}; }

 private:
  std::string where_;
  simdjson::dom::parser parser_;
  simdjson::dom::element root_;
};

std::string_view type_of(const JsonNode& node) { return node.at("type").string(); }

[[noreturn]] void refuse_type(const JsonNode& node, std::string_view kind, std::string_view known) {
  node.fail(cat("libfsdp has no ", kind, " '", type_of(node), "'; it has ", known, "."));
}

// {"String": ".."} or {"Regex": ".."}.
Regex parse_pattern(const JsonNode& node) {
  if (const auto text = node.find("String")) return Regex(escape_regex(text->string()));
  return Regex(node.at("Regex").string());
}

std::string parse_character(const JsonNode& node) {
  const std::string_view text = node.string();
  if (text.empty() || unicode::decode_at(text, 0).num_bytes != text.size())
    node.fail("expected one character.");
  return std::string(text);
}

template <class T, class Parse>
std::vector<std::unique_ptr<T>> parse_parts(const JsonNode& list, Parse parse) {
  std::vector<std::unique_ptr<T>> parts;
  for (const JsonNode& item : list.items()) parts.push_back(parse(item));
  return parts;
}

std::unique_ptr<Normalizer> parse_normalizer(const JsonNode& node) {
  const std::string_view type = type_of(node);
  if (type == "NFC") return make_nfc_normalizer();
  if (type == "Lowercase") return make_lowercase_normalizer();
  if (type == "Prepend") return make_prepend_normalizer(std::string(node.at("prepend").string()));
  if (type == "Replace") {
    return make_replace_normalizer(parse_pattern(node.at("pattern")),
                                   std::string(node.at("content").string()));
  }
  if (type == "Sequence") {
    return make_normalizer_sequence(
        parse_parts<Normalizer>(node.at("normalizers"), parse_normalizer));
  }
  refuse_type(node, "normalizer", "NFC, Lowercase, Prepend, Replace, Sequence");
}

SplitBehavior parse_behavior(const JsonNode& node) {
  const std::string_view name = node.string();
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  node.fail(cat("unknown behavior '", name, "'."));
}

PrependScheme parse_prepend_scheme(const JsonNode& node) {
  auto scheme = PrependScheme::kAlways;
  if (const auto name = node.find("prepend_scheme")) {
    if (name->string() == "first") {
      scheme = PrependScheme::kFirst;
    } else if (name->string() == "never") {
      scheme = PrependScheme::kNever;
    } else if (name->string() != "always") {
      name->fail(cat("unknown prepend_scheme '", name->string(), "'."));
    }
  }
  if (node.boolean_or("add_prefix_space", true) || scheme == PrependScheme::kNever) return scheme;
  if (node.find("prepend_scheme")) node.fail("add_prefix_space contradicts prepend_scheme.");
  return PrependScheme::kNever;
}

// Reads pre-tokenizers and notes whether words end up as bytes.
class PreTokenizerParser {
 public:
  std::unique_ptr<PreTokenizer> parse(const JsonNode& node) {
    if (byte_level_)
      node.fail("nothing may follow ByteLevel; libfsdp keeps words as bytes from there on.");
    const std::string_view type = type_of(node);
    if (type == "ByteLevel") {
      byte_level_ = true;
      return make_byte_level(node.at("add_prefix_space").boolean(),
                             node.boolean_or("use_regex", true));
    }
    if (type == "Split") {
      return make_split(parse_pattern(node.at("pattern")), parse_behavior(node.at("behavior")),
                        node.at("invert").boolean());
    }
    if (type == "Digits") return make_digits(node.at("individual_digits").boolean());
    if (type == "Metaspace") {
      return make_metaspace(parse_character(node.at("replacement")), parse_prepend_scheme(node),
                            node.boolean_or("split", true));
    }
    if (type == "Whitespace") return make_whitespace();
    if (type == "Sequence") {
      return make_pre_tokenizer_sequence(parse_parts<PreTokenizer>(
          node.at("pretokenizers"), [this](const JsonNode& item) { return parse(item); }));
    }
    refuse_type(node, "pre_tokenizer", "ByteLevel, Split, Digits, Metaspace, Whitespace, Sequence");
  }
  bool byte_level() const { return byte_level_; }

 private:
  bool byte_level_ = false;
};

std::unique_ptr<TokenDecoder> parse_decoder(const JsonNode& node) {
  const std::string_view type = type_of(node);
  if (type == "ByteLevel") return make_byte_level_decoder();
  if (type == "ByteFallback") return make_byte_fallback_decoder();
  if (type == "Fuse") return make_fuse_decoder();
  if (type == "Replace") {
    return make_replace_decoder(parse_pattern(node.at("pattern")),
                                std::string(node.at("content").string()));
  }
  if (type == "Strip") {
    const auto count = [&](std::string_view key) {
      return static_cast<size_t>(node.at(key).integer(0, 1 << 20));
    };
    return make_strip_decoder(parse_character(node.at("content")), count("start"), count("stop"));
  }
  if (type == "Metaspace") {
    return make_metaspace_decoder(parse_character(node.at("replacement")),
                                  parse_prepend_scheme(node) != PrependScheme::kNever);
  }
  if (type == "Sequence") {
    return make_decoder_sequence(parse_parts<TokenDecoder>(node.at("decoders"), parse_decoder));
  }
  refuse_type(node, "decoder",
              "ByteLevel, ByteFallback, Fuse, Replace, Strip, Metaspace, Sequence");
}

std::vector<int32_t> special_token_ids(const JsonNode& processor, const JsonNode& special) {
  const std::string_view name = special.at("id").string();
  const auto entry = processor.at("special_tokens").find(name);
  if (!entry) special.fail(cat("'", name, "' is not among special_tokens."));
  std::vector<int32_t> ids;
  for (const JsonNode& id : entry->at("ids").items()) {
    ids.push_back(static_cast<int32_t>(id.integer(0, kMaxTokenIds - 1)));
  }
  return ids;
}

TokenTemplate parse_template(const JsonNode& node) {
  TokenTemplate out;
  for (const JsonNode& item : node.at("single").items()) {
    if (const auto special = item.find("SpecialToken")) {
      out.items.push_back({false, special_token_ids(node, *special)});
    } else if (item.at("Sequence").at("id").string() == "A") {
      out.items.push_back({true, {}});
    } else {
      item.fail("the template of a single text may hold sequence A only.");
    }
  }
  return out;
}

void parse_post_processor(const JsonNode& node, std::vector<TokenTemplate>& templates) {
  const std::string_view type = type_of(node);
  if (type == "ByteLevel") return;  // changes offsets only, and ours are never trimmed
  if (type == "TemplateProcessing") {
    templates.push_back(parse_template(node));
  } else if (type == "Sequence") {
    for (const JsonNode& item : node.at("processors").items())
      parse_post_processor(item, templates);
  } else {
    refuse_type(node, "post_processor", "ByteLevel, TemplateProcessing, Sequence");
  }
}

StringTable parse_vocabulary(const JsonNode& node) {
  StringTable table;
  for (const auto field : node.object()) {
    const JsonNode value(field.value, node.path());
    const auto id = static_cast<int32_t>(value.integer(0, kMaxTokenIds - 1));
    if (!table.insert(field.key, id))
      value.fail(cat("the token '", field.key, "' or its id ", id, " is there twice."));
  }
  return table;
}

using MergeList = std::vector<std::pair<std::string_view, std::string_view>>;

std::pair<std::string_view, std::string_view> parse_merge(const simdjson::dom::element& item,
                                                          const JsonNode& list, size_t index) {
  std::string_view text;
  if (item.get(text) == simdjson::SUCCESS) {
    const size_t space = text.find(' ');
    if (space == std::string_view::npos || text.find(' ', space + 1) != std::string_view::npos) {
      list.fail(cat("merge ", index, " is '", text,
                    "', expected two tokens with one space between them."));
    }
    return {text.substr(0, space), text.substr(space + 1)};
  }
  simdjson::dom::array pair;
  std::string_view left, right;
  if (item.get(pair) != simdjson::SUCCESS || pair.size() != 2 ||
      pair.at(0).get(left) != simdjson::SUCCESS || pair.at(1).get(right) != simdjson::SUCCESS) {
    list.fail(cat("merge ", index, " is neither \"a b\" nor [\"a\", \"b\"]."));
  }
  return {left, right};
}

MergeList parse_merges(const JsonNode& list) {
  MergeList merges;
  for (const auto item : list.array()) {
    std::string_view text;
    const bool version = item.get(text) == simdjson::SUCCESS && text.starts_with("#version");
    if (!version) merges.push_back(parse_merge(item, list, merges.size()));
  }
  return merges;
}

std::unique_ptr<Bpe> parse_model(const JsonNode& node, bool byte_level) {
  if (const auto type = node.find("type"); type && type->string() != "BPE")
    refuse_type(node, "model", "BPE");
  for (const std::string_view affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const auto value = node.find(affix);
    if (value && !value->string().empty()) value->fail("libfsdp does not mark subwords.");
  }
  if (const auto dropout = node.find("dropout"))
    dropout->fail("libfsdp encodes without dropout; expected null.");
  BpeOptions options;
  options.byte_level = byte_level;
  options.byte_fallback = node.boolean_or("byte_fallback", false);
  options.fuse_unk = node.boolean_or("fuse_unk", false);
  options.ignore_merges = node.boolean_or("ignore_merges", false);
  if (const auto unk = node.find("unk_token")) options.unk_token = std::string(unk->string());
  return std::make_unique<Bpe>(parse_vocabulary(node.at("vocab")), parse_merges(node.at("merges")),
                               std::move(options));
}

AddedToken parse_added_token(const JsonNode& item) {
  AddedToken token;
  token.id = static_cast<int32_t>(item.at("id").integer(0, kMaxTokenIds - 1));
  token.content = item.at("content").string();
  token.special = item.at("special").boolean();
  token.normalized = item.at("normalized").boolean();
  token.lstrip = item.at("lstrip").boolean();
  token.rstrip = item.at("rstrip").boolean();
  token.single_word = item.at("single_word").boolean();
  if (token.content.empty()) item.fail("an added token without content.");
  return token;
}

// The `tokenizers` package ignores the ids of the file: a token of the vocabulary keeps its id, any
// other gets the next free one. A file where that gives other ids than it says cannot be read the
// same way by everybody.
void check_added_id(const JsonNode& item, const AddedToken& token, const StringTable& vocabulary,
                    int64_t& next_id) {
  const int32_t known = vocabulary.find(token.content);
  const int64_t expected = known >= 0 ? known : next_id++;
  if (token.id != expected) {
    item.fail(cat("the added token '", token.content, "' has id ", token.id,
                  ", but the vocabulary of ", vocabulary.size(), " tokens makes it ", expected,
                  "."));
  }
  if (known < 0 && vocabulary.text_of(token.id)) {
    item.fail(cat("the id ", token.id, " of '", token.content,
                  "' belongs to another token of the vocabulary."));
  }
}

std::vector<AddedToken> parse_added_tokens(const JsonNode& root, const StringTable& vocabulary) {
  std::vector<AddedToken> tokens;
  const auto list = root.find("added_tokens");
  if (!list) return tokens;
  auto next_id = static_cast<int64_t>(vocabulary.size());
  for (const JsonNode& item : list->items()) {
    tokens.push_back(parse_added_token(item));
    check_added_id(item, tokens.back(), vocabulary, next_id);
  }
  return tokens;
}

void check_template_ids(const TokenizerParts& parts, std::string_view where) {
  for (const TokenTemplate& shape : parts.templates) {
    for (const auto& item : shape.items) {
      for (const int32_t id : item.ids) {
        if (parts.added->by_id(id) == nullptr && !parts.model->vocabulary().text_of(id)) {
          throw ModelError(cat("[tokenizer] ", where, ": post_processor uses the id ", id,
                               ", which no token has."));
        }
      }
    }
  }
}

std::string special_token_text(const JsonNode& root, std::string_view key) {
  const auto value = root.find(key);
  if (!value) return "";
  return std::string(value->is_object() ? value->at("content").string() : value->string());
}

std::string chat_template_text(const JsonNode& root) {
  const auto value = root.find("chat_template");
  if (!value) return "";
  if (value->is_string()) return std::string(value->string());
  for (const JsonNode& named : value->items()) {
    if (named.at("name").string() == "default") return std::string(named.at("template").string());
  }
  return "";
}

std::vector<int32_t> eos_ids(const JsonNode& root) {
  const auto value = root.find("eos_token_id");
  if (!value) return {};
  std::vector<int32_t> ids;
  for (const JsonNode& id : value->is_array() ? value->items() : std::vector<JsonNode>{*value}) {
    ids.push_back(static_cast<int32_t>(id.integer(0, kMaxTokenIds - 1)));
  }
  return ids;
}

void read_special_tokens(const JsonNode& root, TokenizerConfig& config) {
  const auto fill = [&](std::string& token, std::string_view key) {
    if (token.empty()) token = special_token_text(root, key);
  };
  fill(config.bos_token, "bos_token");
  fill(config.eos_token, "eos_token");
  fill(config.pad_token, "pad_token");
  fill(config.unk_token, "unk_token");
}

}  // namespace

TokenizerParts parse_tokenizer_json(std::string_view json, std::string_view where) {
  const JsonDocument document(json, where);
  const JsonNode root = document.root();
  if (const auto version = root.find("version"); version && version->string() != "1.0") {
    version->fail(cat("unknown version '", version->string(), "'."));
  }
  TokenizerParts parts;
  if (const auto node = root.find("normalizer")) parts.normalizer = parse_normalizer(*node);
  PreTokenizerParser pre_tokenizer;
  if (const auto node = root.find("pre_tokenizer"))
    parts.pre_tokenizer = pre_tokenizer.parse(*node);
  if (const auto node = root.find("post_processor")) parse_post_processor(*node, parts.templates);
  if (const auto node = root.find("decoder")) parts.decoder = parse_decoder(*node);
  parts.model = parse_model(root.at("model"), pre_tokenizer.byte_level());
  parts.added = std::make_unique<AddedTokens>(parse_added_tokens(root, parts.model->vocabulary()),
                                              parts.normalizer.get());
  check_template_ids(parts, where);
  return parts;
}

TokenizerConfig parse_tokenizer_config(const TokenizerConfigTexts& texts, std::string_view where) {
  TokenizerConfig config;
  const auto read = [&](std::string_view text, std::string_view name, auto use) {
    if (text.empty()) return;
    const JsonDocument document(text, cat(where, "/", name));
    use(document.root());
  };
  read(texts.tokenizer_config, "tokenizer_config.json", [&](const JsonNode& root) {
    read_special_tokens(root, config);
    config.chat_template = chat_template_text(root);
  });
  read(texts.special_tokens_map, "special_tokens_map.json",
       [&](const JsonNode& root) { read_special_tokens(root, config); });
  read(texts.generation_config, "generation_config.json",
       [&](const JsonNode& root) { config.generation_eos_ids = eos_ids(root); });
  if (!texts.chat_template.empty()) config.chat_template = texts.chat_template;
  return config;
}

}  // namespace fsdp::text
