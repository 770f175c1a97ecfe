// Characters whose properties the libraries that we use do not know the way the `tokenizers`
// package does.
#pragma once

#include <string_view>

namespace fsdp::text::unicode {

/// Word characters and numeric characters that utf8proc does not know yet.
bool is_recent_word(char32_t value);
bool is_recent_numeric(char32_t value);

/// Combining marks that the package's normalizer does not know: it leaves them where they are.
bool is_unknown_mark(char32_t value);

/// Lower case of a capital that utf8proc does not know yet; any other character is returned as it
/// is.
char32_t recent_lower(char32_t value);

/// What PCRE2 lacks of a general category ("L") or script ("Han"), as the inside of a class; empty
/// for nothing.
std::string_view recent_characters(std::string_view property);

}  // namespace fsdp::text::unicode
