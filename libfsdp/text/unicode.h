// UTF-8 and the few Unicode properties that a tokenizer needs. Everything here works on bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fsdp::text::unicode {

/// One code point and the number of bytes it takes.
struct CodePoint {
  char32_t value;
  uint8_t num_bytes;
};

/// Code point that starts at text[at]. `text` must be valid UTF-8 and `at` the start of a
/// character.
CodePoint decode_at(std::string_view text, size_t at);

/// Code point that ends just before text[end]; end > 0.
CodePoint decode_before(std::string_view text, size_t end);

/// Appends the UTF-8 form of `value`.
void append(std::string& out, char32_t value);

/// Position of the first byte that is not part of valid UTF-8 (surrogates and overlong forms are
/// not valid), or npos.
size_t first_invalid(std::string_view text);

/// Number of bytes at the end of `bytes` that may be the beginning of a character whose rest is
/// missing: 0 to 3.
size_t incomplete_tail(std::string_view bytes);

/// `bytes` with every maximal ill-formed part replaced by U+FFFD, as the Unicode standard (chapter
/// 3, table 3-8) advises.
std::string lossy(std::string_view bytes);

/// White_Space.
bool is_space(char32_t value);
/// Categories Nd, Nl and No.
bool is_numeric(char32_t value);
/// Alphabetic, marks, decimal digits, connector punctuation and joiners: `\w` of Rust's regex
/// crate.
bool is_word(char32_t value);

/// A stretch of a rewritten text and the stretch of the text before that it stands for. What no
/// edit covers is equal.
struct Edit {
  size_t begin, end;            ///< bytes in the new text
  size_t from_begin, from_end;  ///< bytes in the old text
};

/// Normalization form C. Appends to `edits` what changed, in order. O(n log n) also for hostile
/// runs of marks.
std::string nfc(std::string_view text, std::vector<Edit>& edits);

/// Full lower case of each character on its own. Appends to `edits` what changed, in order.
std::string lowercase(std::string_view text, std::vector<Edit>& edits);

}  // namespace fsdp::text::unicode
