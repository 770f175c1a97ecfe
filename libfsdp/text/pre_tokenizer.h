// Pre-tokenizers of tokenizer.json: how a text is cut into the words that byte pairs are merged in.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "libfsdp/text/tokenizer_text.h"

namespace fsdp::text {

/// What becomes of the stretch that matched.
enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

/// When a Metaspace puts its mark before a piece.
enum class PrependScheme { kAlways, kNever, kFirst };

/// Cuts pieces into smaller ones. Const and thread-safe. Never hands on an empty piece.
class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  virtual void run(const Piece& piece, TextTrail& trail, PieceSink& next) const = 0;
};

/// Cuts at the matches of a pattern, or (`invert`) at what does not match.
std::unique_ptr<PreTokenizer> make_split(Regex pattern, SplitBehavior behavior, bool invert);
/// Cuts off numbers (categories Nd, Nl, No), each character on its own or in runs.
std::unique_ptr<PreTokenizer> make_digits(bool individual_digits);
/// GPT-2's: a space put in front if asked for, then GPT-2's pattern if asked for. The bytes stay
/// bytes here; that the vocabulary spells them as printable characters is known to Bpe.
std::unique_ptr<PreTokenizer> make_byte_level(bool add_prefix_space, bool use_regex);
/// SentencePiece's: spaces become `mark` (one character), which also starts a piece.
std::unique_ptr<PreTokenizer> make_metaspace(std::string mark, PrependScheme scheme, bool split);
/// Words and punctuation, white space removed: \w+|[^\w\s]+.
std::unique_ptr<PreTokenizer> make_whitespace();
/// One after the other.
std::unique_ptr<PreTokenizer> make_pre_tokenizer_sequence(
    std::vector<std::unique_ptr<PreTokenizer>> parts);

}  // namespace fsdp::text
