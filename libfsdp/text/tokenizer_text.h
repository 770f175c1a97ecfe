// The text on its way through a tokenizer: pieces of it, rewritten or not, that remember where they
// came from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/text/tokenizer_regex.h"
#include "libfsdp/text/unicode.h"

namespace fsdp::text {

/// A stretch of one of the texts of a TextTrail. Cheap to copy; valid as long as the trail.
struct Piece {
  std::string_view text;
  uint32_t source = 0;  ///< which text of the trail
  size_t begin = 0;     ///< where `text` starts in it

  Piece part(size_t from, size_t to) const {
    return {text.substr(from, to - from), source, begin + from};
  }
};

/// Takes pieces one by one; a stage of the tokenizer hands its result to the next stage through it.
class PieceSink {
 public:
  virtual ~PieceSink() = default;
  virtual void take(const Piece& piece) = 0;
};

/// Owns every rewritten text of one encode call and maps positions in them back to the original.
/// Not thread-safe.
class TextTrail {
 public:
  explicit TextTrail(std::string_view original) : original_(original) {}
  TextTrail(const TextTrail&) = delete;
  TextTrail& operator=(const TextTrail&) = delete;

  /// The whole original text as a piece.
  Piece whole() const { return {original_, 0, 0}; }

  /// `now` in the place of `before`; `edits` say which stretches of `now` differ, in order
  /// (positions within `before`).
  Piece rewrite(const Piece& before, std::string now, std::vector<unicode::Edit> edits);

  /// Bytes of the original that piece.text[begin, end) stands for. Cost: O(log edits) for each
  /// rewriting passed.
  ByteSpan origin(const Piece& piece, size_t begin, size_t end) const;

  size_t original_bytes() const { return original_.size(); }

 private:
  struct Rewritten {
    std::string text;
    std::vector<unicode::Edit> edits;
    uint32_t parent;
    size_t parent_begin;
  };

  std::string_view original_;
  std::deque<Rewritten> texts_;  // a deque keeps the views into its strings valid
};

}  // namespace fsdp::text
