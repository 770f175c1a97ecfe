#include "libfsdp/text/added_tokens.h"

#include <algorithm>

#include "libfsdp/base/error.h"

namespace fsdp::text {
namespace {

bool ends_with_word(std::string_view text) {
  return unicode::is_word(unicode::decode_before(text, text.size()).value);
}
bool starts_with_word(std::string_view text) {
  return unicode::is_word(unicode::decode_at(text, 0).value);
}

size_t end_of_leading_space(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const auto point = unicode::decode_at(text, at);
    if (!unicode::is_space(point.value)) break;
    at += point.num_bytes;
  }
  return at;
}

// Looks back no further than `floor`.
size_t start_of_trailing_space(std::string_view text, size_t floor) {
  size_t end = text.size();
  while (end > floor) {
    const auto point = unicode::decode_before(text, end);
    if (!unicode::is_space(point.value)) break;
    end -= point.num_bytes;
  }
  return end;
}

}  // namespace

uint32_t StringFinder::child_of(uint32_t node, uint8_t byte) const {
  const auto& children = nodes_[node].children;
  const auto at = std::lower_bound(children.begin(), children.end(), byte,
                                   [](const auto& child, uint8_t b) { return child.first < b; });
  return at != children.end() && at->first == byte ? at->second : 0;
}

void StringFinder::add(std::string_view text, size_t value) {
  check(!text.empty(), "an empty string cannot be looked for");
  uint32_t node = 0;
  for (const char c : text) {
    const auto byte = static_cast<uint8_t>(c);
    uint32_t next = child_of(node, byte);
    if (next == 0) {
      next = static_cast<uint32_t>(nodes_.size());
      nodes_.emplace_back();
      auto& children = nodes_[node].children;
      const auto at =
          std::lower_bound(children.begin(), children.end(), byte,
                           [](const auto& child, uint8_t b) { return child.first < b; });
      children.insert(at, {byte, next});
      if (node == 0) roots_[byte] = next;
    }
    node = next;
  }
  if (nodes_[node].value != kNone)
    throw ModelError(cat("[tokenizer] two added tokens match the same text '", text, "'."));
  nodes_[node].value = value;
}

std::optional<StringFinder::Match> StringFinder::find(std::string_view text, size_t from) const {
  for (size_t begin = from; begin < text.size(); ++begin) {
    uint32_t node = roots_[static_cast<uint8_t>(text[begin])];
    if (node == 0) continue;
    std::optional<Match> longest;
    for (size_t at = begin + 1;; ++at) {
      if (nodes_[node].value != kNone) longest = Match{{begin, at}, nodes_[node].value};
      if (at >= text.size()) break;
      node = child_of(node, static_cast<uint8_t>(text[at]));
      if (node == 0) break;
    }
    if (longest) return longest;
  }
  return std::nullopt;
}

AddedTokens::AddedTokens(std::vector<AddedToken> tokens, const Normalizer* normalizer)
    : tokens_(std::move(tokens)) {
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const AddedToken& token = tokens_[i];
    if (!by_id_.emplace(token.id, i).second) {
      throw ModelError(cat("[tokenizer] two added tokens have the id ", token.id, "; one is '",
                           token.content, "'."));
    }
    if (!by_content_.emplace(token.content, i).second) {
      throw ModelError(cat("[tokenizer] the added token '", token.content, "' is there twice."));
    }
    const bool rewritten = token.normalized && normalizer != nullptr;
    decoder_texts_.push_back(rewritten ? normalizer->apply_to(token.content) : token.content);
    if (decoder_texts_.back().empty()) {
      throw ModelError(cat("[tokenizer] nothing is left of the added token '", token.content,
                           "' after normalization."));
    }
    (token.normalized ? normalized_ : original_).add(decoder_texts_.back(), i);
  }
}

void AddedTokens::split_original(const Piece& piece, const OnText& on_text,
                                 const OnToken& on_token) const {
  split(original_, piece, on_text, on_token);
}

void AddedTokens::split_normalized(const Piece& piece, const OnText& on_text,
                                   const OnToken& on_token) const {
  split(normalized_, piece, on_text, on_token);
}

void AddedTokens::split(const StringFinder& finder, const Piece& piece, const OnText& on_text,
                        const OnToken& on_token) const {
  const std::string_view text = piece.text;
  size_t done = 0;    // what is before it has been handed on
  size_t search = 0;  // where to look next
  while (!finder.empty()) {
    const auto match = finder.find(text, search);
    if (!match) break;
    const AddedToken& token = tokens_[match->value];
    auto [begin, end] = match->span;
    search = end;
    if (token.single_word) {
      const bool joined_left = begin > 0 && ends_with_word(text.substr(0, begin));
      const bool joined_right = end < text.size() && starts_with_word(text.substr(end));
      if (joined_left || joined_right) continue;
    }
    if (token.lstrip) begin = start_of_trailing_space(text.substr(0, begin), std::min(done, begin));
    if (token.rstrip) end += end_of_leading_space(text.substr(end));
    if (done < begin) on_text(piece.part(done, begin));
    on_token(token, piece.part(begin, end));
    done = end;
  }
  if (done < text.size()) on_text(piece.part(done, text.size()));
}

const AddedToken* AddedTokens::by_id(int32_t id) const {
  const auto at = by_id_.find(id);
  return at == by_id_.end() ? nullptr : &tokens_[at->second];
}

const AddedToken* AddedTokens::by_content(std::string_view content) const {
  const auto at = by_content_.find(std::string(content));
  return at == by_content_.end() ? nullptr : &tokens_[at->second];
}

const std::string& AddedTokens::decoder_text(const AddedToken& token) const {
  return decoder_texts_[by_id_.at(token.id)];
}

}  // namespace fsdp::text
