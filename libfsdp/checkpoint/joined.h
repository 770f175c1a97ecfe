// Texts that must be right: names of files, documents.
#pragma once

#include <concepts>
#include <string>
#include <string_view>

namespace fsdp::checkpoint {

inline void append_part(std::string& text, std::string_view part) { text.append(part); }
template <std::integral I>
void append_part(std::string& text, I number) {
  text.append(std::to_string(number));
}

/// The parts one behind the other. Unlike fsdp::cat, whose stream drops what it has no memory for,
/// it throws std::bad_alloc.
template <class... Parts>
std::string joined(const Parts&... parts) {
  std::string text;
  (append_part(text, parts), ...);
  return text;
}

}  // namespace fsdp::checkpoint
