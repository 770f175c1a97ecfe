// UTF-8 helpers with Python's notions of a space, a case mapping and a printable character.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace fsdp::text::jinja {

/// Code point that starts at text[at]; advances `at` past it. A byte that is not UTF-8 counts as
/// one code point.
char32_t next_code_point(std::string_view text, size_t& at);

/// Appends the UTF-8 form of `code`.
void append_utf8(std::string& out, char32_t code);

std::u32string to_utf32(std::string_view text);
std::string to_utf8(std::u32string_view text);

/// Number of code points.
size_t count_code_points(std::string_view text);

/// True when every byte is ASCII, so that bytes and code points are the same thing.
bool is_ascii(std::string_view text);

/// Python's str.isspace for one character.
bool is_space(char32_t code);
/// False for what Python's repr escapes.
bool is_printable(char32_t code);
bool is_upper(char32_t code);
bool is_lower(char32_t code);
bool is_alpha(char32_t code);
bool is_digit(char32_t code);

/// Simple (one to one) case mappings.
char32_t to_upper(char32_t code);
char32_t to_lower(char32_t code);
/// As Python, but for the rare letters (ligatures) whose capitals are several; ß becomes SS.
std::string upper(std::string_view text);
std::string lower(std::string_view text);

/// Without the characters of `chars` (white space when empty) at the left and/or right end.
std::string_view strip(std::string_view text, bool left, bool right, std::string_view chars = {});

}  // namespace fsdp::text::jinja
