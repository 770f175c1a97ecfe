#include "libfsdp/text/tokenizer.h"

#include <algorithm>

#include "libfsdp/base/error.h"
#include "libfsdp/base/log.h"
#include "libfsdp/text/gguf_tokenizer.h"
#include "libfsdp/text/tokenizer_files.h"
#include "libfsdp/text/tokenizer_json.h"
#include "libfsdp/text/unicode.h"

namespace fsdp::text {
namespace {

std::optional<int32_t> named_id(const TokenizerParts& parts, const std::string& token,
                                std::string_view role) {
  if (token.empty()) return std::nullopt;
  if (const AddedToken* added = parts.added->by_content(token)) return added->id;
  const int32_t id = parts.model->vocabulary().find(token);
  if (id >= 0) return id;
  log::warning(cat("[tokenizer] the ", role, " token '", token,
                   "' is not in the vocabulary; it is ignored."));
  return std::nullopt;
}

}  // namespace

struct Tokenizer::Impl {
  TokenizerParts parts;
  TokenizerConfig config;
  std::vector<TokenizerFile> files;
  std::optional<int32_t> bos, eos, pad, unk;
  std::vector<int32_t> stop_ids;
  std::vector<SpecialToken> special_tokens;
  size_t vocab_size = 0;
  int32_t id_limit = 0;

  Impl(TokenizerParts parts_in, TokenizerConfig config_in, std::vector<TokenizerFile> files_in)
      : parts(std::move(parts_in)), config(std::move(config_in)), files(std::move(files_in)) {
    bos = named_id(parts, config.bos_token, "bos");
    eos = named_id(parts, config.eos_token, "eos");
    pad = named_id(parts, config.pad_token, "pad");
    unk = named_id(parts, config.unk_token, "unk");
    if (eos) stop_ids.push_back(*eos);
    for (const int32_t id : config.generation_eos_ids) {
      if (std::find(stop_ids.begin(), stop_ids.end(), id) == stop_ids.end()) stop_ids.push_back(id);
    }
    count_tokens();
  }

  void count_tokens() {
    const StringTable& vocabulary = parts.model->vocabulary();
    vocab_size = vocabulary.size();
    id_limit = vocabulary.id_limit();
    for (const AddedToken& token : parts.added->all()) {
      if (!vocabulary.text_of(token.id)) ++vocab_size;
      id_limit = std::max(id_limit, token.id + 1);
      if (token.special) special_tokens.push_back({token.id, token.content});
    }
    std::sort(special_tokens.begin(), special_tokens.end(),
              [](const SpecialToken& a, const SpecialToken& b) { return a.id < b.id; });
  }

  // The spelling that decoders work on, or nothing for an unknown id.
  std::optional<std::string> decoder_token(int32_t id, bool skip_special) const {
    if (const AddedToken* token = parts.added->by_id(id)) {
      if (skip_special && token->special) return std::nullopt;
      return parts.added->decoder_text(*token);
    }
    const auto text = parts.model->vocabulary().text_of(id);
    return text ? std::optional<std::string>(*text) : std::nullopt;
  }

  std::string decode(std::span<const int32_t> ids, bool skip_special) const;
};

namespace {

// Receives words and added tokens in the order of the text and collects their ids, with spans if
// they are wanted.
class EncodingSink final : public PieceSink {
 public:
  EncodingSink(const TokenizerParts& parts, TextTrail& trail, bool with_spans)
      : parts_(parts), trail_(trail), with_spans_(with_spans) {}

  void take(const Piece& word) override {
    tokens_.clear();
    parts_.model->encode(word.text, tokens_);
    for (const BpeToken& token : tokens_) {
      out_.ids.push_back(token.id);
      if (with_spans_) out_.spans.push_back(trail_.origin(word, token.begin, token.end));
    }
  }

  void take_added(const AddedToken& token, const Piece& piece) {
    out_.ids.push_back(token.id);
    if (with_spans_) out_.spans.push_back(trail_.origin(piece, 0, piece.text.size()));
  }

  Encoding finish() { return std::move(out_); }

 private:
  const TokenizerParts& parts_;
  TextTrail& trail_;
  const bool with_spans_;
  std::vector<BpeToken> tokens_;
  Encoding out_;
};

void encode_text(const TokenizerParts& parts, TextTrail& trail, EncodingSink& sink) {
  const auto on_token = [&](const AddedToken& token, const Piece& piece) {
    sink.take_added(token, piece);
  };
  const auto on_words = [&](const Piece& piece) {
    if (parts.pre_tokenizer) {
      parts.pre_tokenizer->run(piece, trail, sink);
    } else {
      sink.take(piece);
    }
  };
  const auto on_text = [&](const Piece& piece) {
    const Piece now = parts.normalizer ? parts.normalizer->apply(piece, trail) : piece;
    parts.added->split_normalized(now, on_words, on_token);
  };
  parts.added->split_original(trail.whole(), on_text, on_token);
}

Encoding apply_template(const TokenTemplate& shape, const Encoding& text, size_t text_bytes,
                        bool with_spans) {
  Encoding out;
  bool text_seen = false;
  for (const auto& item : shape.items) {
    if (item.is_text) {
      text_seen = true;
      out.ids.insert(out.ids.end(), text.ids.begin(), text.ids.end());
      out.spans.insert(out.spans.end(), text.spans.begin(), text.spans.end());
      continue;
    }
    out.ids.insert(out.ids.end(), item.ids.begin(), item.ids.end());
    const size_t at = text_seen ? text_bytes : 0;
    if (with_spans) out.spans.insert(out.spans.end(), item.ids.size(), ByteSpan{at, at});
  }
  return out;
}

Encoding encode_checked(const TokenizerParts& parts, std::string_view text, bool add_special_tokens,
                        bool with_spans) {
  if (const size_t bad = unicode::first_invalid(text); bad != std::string_view::npos) {
    throw DataError(
        cat("[tokenizer] the text is not UTF-8 at byte ", bad, " of ", text.size(), "."));
  }
  TextTrail trail(text);
  EncodingSink sink(parts, trail, with_spans);
  encode_text(parts, trail, sink);
  Encoding out = sink.finish();
  if (!add_special_tokens) return out;
  for (const TokenTemplate& shape : parts.templates)
    out = apply_template(shape, out, text.size(), with_spans);
  return out;
}

}  // namespace

std::string Tokenizer::Impl::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::vector<std::string> tokens;
  tokens.reserve(ids.size());
  for (const int32_t id : ids) {
    if (auto token = decoder_token(id, skip_special)) tokens.push_back(*std::move(token));
  }
  if (parts.decoder) parts.decoder->apply(tokens);
  std::string out;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0 && !parts.decoder) out += ' ';
    out += tokens[i];
  }
  return out;
}

Tokenizer Tokenizer::from_directory(const std::filesystem::path& directory) {
  const auto read = [&](const char* name) { return read_tokenizer_file(directory / name); };
  const std::string json = read("tokenizer.json");
  if (json.empty()) {
    throw ModelError(cat("[tokenizer] there is no tokenizer.json in ", directory.string(),
                         ". Hint: libfsdp reads fast tokenizers; save the tokenizer with "
                         "transformers to make one."));
  }
  const std::string config = read("tokenizer_config.json"), map = read("special_tokens_map.json"),
                    generation = read("generation_config.json"), chat = read("chat_template.jinja");
  return Tokenizer(std::make_shared<Impl>(
      parse_tokenizer_json(json, (directory / "tokenizer.json").string()),
      parse_tokenizer_config({config, map, generation, chat}, directory.string()),
      list_tokenizer_files(directory)));
}

Tokenizer Tokenizer::from_json(std::string tokenizer_json, std::string tokenizer_config_json,
                               std::string_view where) {
  auto parts = parse_tokenizer_json(tokenizer_json, where);
  auto config = parse_tokenizer_config({tokenizer_config_json, {}, {}, {}}, where);
  std::vector<TokenizerFile> files;
  files.push_back({"tokenizer.json", {}, std::move(tokenizer_json)});
  if (!tokenizer_config_json.empty())
    files.push_back({"tokenizer_config.json", {}, std::move(tokenizer_config_json)});
  return Tokenizer(std::make_shared<Impl>(std::move(parts), std::move(config), std::move(files)));
}

Tokenizer Tokenizer::from_gguf(const GgufVocabulary& vocabulary) {
  GgufTokenizerTexts texts = make_tokenizer_texts(vocabulary);
  return from_json(std::move(texts.tokenizer_json), std::move(texts.tokenizer_config_json),
                   "tokenizer of a GGUF file");
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  return encode_checked(impl_->parts, text, add_special_tokens, false).ids;
}

Encoding Tokenizer::encode_with_offsets(std::string_view text, bool add_special_tokens) const {
  return encode_checked(impl_->parts, text, add_special_tokens, true);
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  return impl_->decode(ids, skip_special_tokens);
}

std::optional<int32_t> Tokenizer::id_of(std::string_view token) const {
  if (const AddedToken* added = impl_->parts.added->by_content(token)) return added->id;
  const int32_t id = impl_->parts.model->vocabulary().find(token);
  return id < 0 ? std::nullopt : std::optional<int32_t>(id);
}

std::optional<std::string> Tokenizer::token_of(int32_t id) const {
  if (const AddedToken* added = impl_->parts.added->by_id(id)) return added->content;
  const auto text = impl_->parts.model->vocabulary().text_of(id);
  return text ? std::optional<std::string>(*text) : std::nullopt;
}

bool Tokenizer::is_special(int32_t id) const {
  const AddedToken* token = impl_->parts.added->by_id(id);
  return token != nullptr && token->special;
}

void Tokenizer::save(const std::filesystem::path& directory) const {
  for (const TokenizerFile& file : impl_->files) write_tokenizer_file(file, directory);
}

size_t Tokenizer::vocab_size() const { return impl_->vocab_size; }
int32_t Tokenizer::id_limit() const { return impl_->id_limit; }
std::optional<int32_t> Tokenizer::bos_id() const { return impl_->bos; }
std::optional<int32_t> Tokenizer::eos_id() const { return impl_->eos; }
std::optional<int32_t> Tokenizer::pad_id() const { return impl_->pad; }
std::optional<int32_t> Tokenizer::unk_id() const { return impl_->unk; }
const std::string& Tokenizer::bos_token() const { return impl_->config.bos_token; }
const std::string& Tokenizer::eos_token() const { return impl_->config.eos_token; }
const std::string& Tokenizer::pad_token() const { return impl_->config.pad_token; }
const std::string& Tokenizer::unk_token() const { return impl_->config.unk_token; }
const std::vector<int32_t>& Tokenizer::stop_ids() const { return impl_->stop_ids; }
const std::vector<SpecialToken>& Tokenizer::special_tokens() const { return impl_->special_tokens; }
const std::string& Tokenizer::chat_template() const { return impl_->config.chat_template; }

// Byte-level decoders are streamed byte by byte. Any other one (a first token may lose its space,
// bytes may be fused) decodes a short window with and without the new tokens and hands out the
// difference.
struct StreamDecoder::State {
  std::shared_ptr<const Tokenizer::Impl> tokenizer;
  bool skip_special;
  bool byte_level;
  std::string bytes;            // byte-level: what may still be half a character
  std::vector<int32_t> window;  // otherwise: tokens handed out (the first `context`) and not yet
  size_t context = 0;

  std::string push_bytes(int32_t id) {
    const auto token = tokenizer->decoder_token(id, skip_special);
    if (!token) return "";
    bytes += byte_level_token_bytes(*token);
    const size_t ready = bytes.size() - unicode::incomplete_tail(bytes);
    std::string out = unicode::lossy(std::string_view(bytes).substr(0, ready));
    bytes.erase(0, ready);
    return out;
  }

  std::string push_window(int32_t id) {
    window.push_back(id);
    return window.size() - context > kMaxHeldTokens ? hand_out(true) : hand_out(false);
  }

  // A character may still grow while the text ends in U+FFFD.
  std::string hand_out(bool all) {
    const std::string before = tokenizer->decode(std::span(window).first(context), skip_special);
    const std::string now = tokenizer->decode(window, skip_special);
    if (now.size() <= before.size() || (!all && now.ends_with("\xef\xbf\xbd"))) return "";
    window.erase(window.begin(), window.begin() + static_cast<ptrdiff_t>(context));
    context = window.size();
    return now.substr(before.size());
  }

  static constexpr size_t kMaxHeldTokens = 16;
};

StreamDecoder::StreamDecoder(std::unique_ptr<State> state) : state_(std::move(state)) {}
StreamDecoder::~StreamDecoder() = default;
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder& StreamDecoder::operator=(StreamDecoder&&) noexcept = default;

StreamDecoder Tokenizer::stream_decoder(bool skip_special_tokens) const {
  auto state = std::make_unique<StreamDecoder::State>();
  state->tokenizer = impl_;
  state->skip_special = skip_special_tokens;
  state->byte_level = impl_->parts.decoder && impl_->parts.decoder->is_byte_level();
  return StreamDecoder(std::move(state));
}

std::string StreamDecoder::push(int32_t id) {
  return state_->byte_level ? state_->push_bytes(id) : state_->push_window(id);
}

std::string StreamDecoder::finish() {
  std::string out = state_->byte_level ? unicode::lossy(state_->bytes) : state_->hand_out(true);
  state_->bytes.clear();
  state_->window.clear();
  state_->context = 0;
  return out;
}

}  // namespace fsdp::text
