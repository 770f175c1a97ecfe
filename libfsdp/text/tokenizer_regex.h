// Regular expressions of tokenizer.json, matched by PCRE2 as the `tokenizers` package (Oniguruma)
// matches them.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace fsdp::text {

/// A stretch of bytes, [begin, end).
struct ByteSpan {
  size_t begin = 0;
  size_t end = 0;
  bool operator==(const ByteSpan&) const = default;
};

/// `pattern` in Oniguruma's Ruby syntax, rewritten so that PCRE2 gives the same meaning to \s, \w,
/// \d, \b, \h, \p{..} and (?m). Throws ModelError for what has no counterpart: nested classes,
/// `&&`, {n,m}+, and \W, \D, \H or a negated property inside a class.
std::string pcre_from_oniguruma(std::string_view pattern);

/// `text` with every character that is special in a regular expression escaped.
std::string escape_regex(std::string_view text);

/// A compiled pattern. Const functions are thread-safe.
class Regex {
 public:
  /// Compiles a pattern in Oniguruma's syntax. Throws ModelError with the pattern and the position
  /// of the fault.
  explicit Regex(std::string_view pattern);

  /// First match at or after `from`, as a search over the whole of `text`, which must be valid
  /// UTF-8. Throws DataError when the pattern backtracks too much on this text.
  std::optional<ByteSpan> find(std::string_view text, size_t from) const;

  const std::string& pattern() const { return pattern_; }

 private:
  struct Code;
  std::string pattern_;
  std::shared_ptr<const Code> code_;
};

/// All matches from left to right, without an empty match right after another match.
class RegexMatches {
 public:
  RegexMatches(const Regex& regex, std::string_view text) : regex_(regex), text_(text) {}

  /// The next match, or nothing at the end.
  std::optional<ByteSpan> next();

 private:
  const Regex& regex_;
  std::string_view text_;
  size_t from_ = 0;
  size_t last_end_ = std::string_view::npos;
};

}  // namespace fsdp::text
