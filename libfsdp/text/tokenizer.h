// Text to token ids and back, as the `tokenizers` package does it for byte-pair encodings.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/text/tokenizer_regex.h"

namespace fsdp::text {

struct GgufVocabulary;

/// Tokens of a text and the bytes of the text that each stands for.
///
/// Spans do not overlap and leave nothing out, except where a normalizer rewrote the text (then the
/// tokens of a rewritten stretch share it) and for tokens that the post-processor adds (empty spans
/// at the ends). Unlike the `tokenizers` package, spans count bytes and are never trimmed of white
/// space.
struct Encoding {
  std::vector<int32_t> ids;
  std::vector<ByteSpan> spans;
};

struct SpecialToken {
  int32_t id;
  std::string content;
};

/// Turns ids into text while they arrive. Never hands out part of a character. Not thread-safe.
class StreamDecoder {
 public:
  /// The text that became certain with this token; often empty, sometimes several characters.
  std::string push(int32_t id);
  /// What is left, with U+FFFD for an incomplete character. The decoder starts afresh.
  std::string finish();

  ~StreamDecoder();
  StreamDecoder(StreamDecoder&&) noexcept;
  StreamDecoder& operator=(StreamDecoder&&) noexcept;

 private:
  friend class Tokenizer;
  struct State;
  explicit StreamDecoder(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

/// A byte-pair tokenizer. A cheap handle: copies share one immutable tokenizer. All const functions
/// are thread-safe.
class Tokenizer {
 public:
  /// Reads tokenizer.json and, where they exist, tokenizer_config.json, special_tokens_map.json,
  /// generation_config.json and chat_template.jinja. Cost: about 0.1 s for 150,000 tokens. Throws
  /// ModelError for a missing or malformed tokenizer.json, or one that needs what libfsdp does not
  /// have (named).
  static Tokenizer from_directory(const std::filesystem::path& directory);

  /// The same from texts in memory; an empty text stands for a file that is not there. `where`
  /// names them in errors.
  static Tokenizer from_json(std::string tokenizer_json, std::string tokenizer_config_json = "",
                             std::string_view where = "tokenizer.json in memory");

  /// From the vocabulary of a GGUF file (gguf_tokenizer.h). Throws ModelError.
  static Tokenizer from_gguf(const GgufVocabulary& vocabulary);

  /// Ids of `text`, in which added tokens such as "<|im_end|>" are recognised.
  /// `add_special_tokens`: with what the post-processor puts around a text (the bos of Llama 3).
  /// Texts rendered by a chat template hold those already. Throws DataError for text that is not
  /// UTF-8.
  std::vector<int32_t> encode(std::string_view text, bool add_special_tokens = true) const;

  /// The same with the bytes that each token stands for.
  Encoding encode_with_offsets(std::string_view text, bool add_special_tokens = true) const;

  /// Text of `ids`; ids that no token has are left out, as the `tokenizers` package does.
  std::string decode(std::span<const int32_t> ids, bool skip_special_tokens = false) const;

  /// A decoder for ids that arrive one by one. It may outlive the tokenizer.
  StreamDecoder stream_decoder(bool skip_special_tokens = false) const;

  /// Number of tokens, added ones included.
  size_t vocab_size() const;
  /// One more than the largest id. A model needs at least this many rows of embedding.
  int32_t id_limit() const;

  std::optional<int32_t> id_of(std::string_view token) const;
  /// The token as the vocabulary spells it ("Ġthe"), or nothing.
  std::optional<std::string> token_of(int32_t id) const;
  /// True for tokens that decode(skip_special_tokens) leaves out.
  bool is_special(int32_t id) const;

  /// The named special tokens; nothing, and an empty string, when the files name none.
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;
  std::optional<int32_t> pad_id() const;
  std::optional<int32_t> unk_id() const;
  const std::string& bos_token() const;
  const std::string& eos_token() const;
  const std::string& pad_token() const;
  const std::string& unk_token() const;

  /// Ids that end a generation: eos and those of generation_config.json, without repeats.
  const std::vector<int32_t>& stop_ids() const;
  /// All added tokens that are special, by id.
  const std::vector<SpecialToken>& special_tokens() const;
  /// The Jinja text of the default chat template; empty when there is none.
  const std::string& chat_template() const;

  /// Writes the tokenizer's files into `directory` (which must exist), each aside and then renamed:
  /// copies of the source files where it was read from files, else tokenizer.json and
  /// tokenizer_config.json. generation_config.json belongs to the model and is not written. Throws
  /// HostResourceError naming the file.
  void save(const std::filesystem::path& directory) const;

 private:
  friend class StreamDecoder;
  struct Impl;
  explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

}  // namespace fsdp::text
