// Tokens that are found in the text itself, before it is cut into words: "<|im_start|>" and its
// like.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "libfsdp/text/tokenizer_normalizer.h"
#include "libfsdp/text/tokenizer_text.h"

namespace fsdp::text {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;      ///< left out by decode(skip_special_tokens)
  bool normalized = false;   ///< looked for in the normalized text, not in the original
  bool lstrip = false;       ///< takes in the white space on its left
  bool rstrip = false;       ///< takes in the white space on its right
  bool single_word = false;  ///< not found inside a word
};

/// Finds strings in a text, leftmost first, the longest of those that start at the same place.
class StringFinder {
 public:
  /// Adds a string that is not empty. Throws ModelError for one that is there already.
  void add(std::string_view text, size_t value);

  struct Match {
    ByteSpan span;
    size_t value;
  };
  /// First match at or after `from`. Cost: O(bytes passed * length of the longest string) at worst.
  std::optional<Match> find(std::string_view text, size_t from) const;

  bool empty() const { return nodes_.size() == 1; }

 private:
  struct Node {
    size_t value = kNone;
    std::vector<std::pair<uint8_t, uint32_t>> children;  // sorted by byte
  };
  static constexpr size_t kNone = static_cast<size_t>(-1);
  uint32_t child_of(uint32_t node, uint8_t byte) const;

  std::vector<Node> nodes_{1};
  std::array<uint32_t, 256> roots_{};  // child of the root by first byte, 0 for none
};

/// All added tokens of a tokenizer. Const functions are thread-safe.
class AddedTokens {
 public:
  /// Throws ModelError when two tokens have one id, one content, or one normalized content.
  AddedTokens(std::vector<AddedToken> tokens, const Normalizer* normalizer);

  /// What a text is split into: pieces without an added token, and the tokens between them.
  using OnText = std::function<void(const Piece&)>;
  using OnToken = std::function<void(const AddedToken&, const Piece&)>;

  /// Splits at the tokens that are looked for in the original text (`normalized` false), from left
  /// to right.
  void split_original(const Piece& piece, const OnText& on_text, const OnToken& on_token) const;
  /// The same for tokens that are looked for in the normalized text.
  void split_normalized(const Piece& piece, const OnText& on_text, const OnToken& on_token) const;

  const std::vector<AddedToken>& all() const { return tokens_; }
  const AddedToken* by_id(int32_t id) const;
  const AddedToken* by_content(std::string_view content) const;
  /// How the token is spelled for the decoder: the normalized content for a normalized token.
  const std::string& decoder_text(const AddedToken& token) const;

 private:
  void split(const StringFinder& finder, const Piece& piece, const OnText& on_text,
             const OnToken& on_token) const;

  std::vector<AddedToken> tokens_;
  std::vector<std::string> decoder_texts_;
  std::unordered_map<int32_t, size_t> by_id_;
  std::unordered_map<std::string, size_t> by_content_;
  StringFinder original_, normalized_;
};

}  // namespace fsdp::text
