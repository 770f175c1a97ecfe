#include "libfsdp/text/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "libfsdp/base/error.h"
#include "libfsdp/text/unicode_tables.h"

namespace fsdp::text::unicode {
namespace {

constexpr char32_t kFirstCombining =
    0x300;  // below it, nothing composes with what stands before it

struct SequenceCheck {
  size_t num_bytes;  // bytes that belong together: the character, or the maximal ill-formed part
  bool valid;
  bool truncated;  // ill-formed only because the text ends
};

// Number of bytes that `lead` announces, and the range that its second byte must lie in; 0 for no
// lead byte.
struct LeadByte {
  size_t num_bytes;
  uint8_t second_min, second_max;
};

LeadByte classify_lead(uint8_t lead) {
  if (lead < 0x80) return {1, 0, 0};
  if (lead >= 0xc2 && lead <= 0xdf) return {2, 0x80, 0xbf};
  if (lead == 0xe0) return {3, 0xa0, 0xbf};
  if (lead == 0xed) return {3, 0x80, 0x9f};  // no surrogates
  if (lead >= 0xe1 && lead <= 0xef) return {3, 0x80, 0xbf};
  if (lead == 0xf0) return {4, 0x90, 0xbf};
  if (lead >= 0xf1 && lead <= 0xf3) return {4, 0x80, 0xbf};
  if (lead == 0xf4) return {4, 0x80, 0x8f};
  return {0, 0, 0};
}

SequenceCheck check_sequence(std::string_view text, size_t at) {
  const LeadByte lead = classify_lead(static_cast<uint8_t>(text[at]));
  if (lead.num_bytes == 0) return {1, false, false};
  for (size_t i = 1; i < lead.num_bytes; ++i) {
    if (at + i >= text.size()) return {i, false, true};
    const auto byte = static_cast<uint8_t>(text[at + i]);
    const uint8_t low = i == 1 ? lead.second_min : 0x80;
    const uint8_t high = i == 1 ? lead.second_max : 0xbf;
    if (byte < low || byte > high) return {i, false, false};
  }
  return {lead.num_bytes, true, false};
}

utf8proc_category_t category_of(char32_t value) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(value));
}

bool is_mark(char32_t value) {
  const auto category = category_of(value);
  return category == UTF8PROC_CATEGORY_MN || category == UTF8PROC_CATEGORY_MC ||
         category == UTF8PROC_CATEGORY_ME;
}

// Vowels and final consonants of Hangul, which compose with what stands before them without being
// marks.
bool is_trailing_jamo(char32_t value) { return value >= 0x1160 && value <= 0x11ff; }

bool may_join_previous(char32_t value) {
  return value >= kFirstCombining && (is_mark(value) || is_trailing_jamo(value)) &&
         !is_unknown_mark(value);
}

// A character that is its own normal form when nothing joins it.
bool stands_alone(char32_t value) {
  if (value < kFirstCombining) return true;
  if (value >= 0xac00 && value <= 0xd7a3) return true;
  const utf8proc_property_t* property = utf8proc_get_property(static_cast<utf8proc_int32_t>(value));
  return property->decomp_seqindex == UINT16_MAX || property->decomp_type != 0;
}

void sort_marks(std::vector<utf8proc_int32_t>& points) {
  const auto combining_class = [](utf8proc_int32_t point) {
    return is_unknown_mark(static_cast<char32_t>(point))
               ? 0
               : utf8proc_get_property(point)->combining_class;
  };
  for (size_t i = 0; i < points.size();) {
    if (combining_class(points[i]) == 0) {
      ++i;
      continue;
    }
    size_t end = i;
    while (end < points.size() && combining_class(points[end]) != 0) ++end;
    std::stable_sort(points.begin() + static_cast<ptrdiff_t>(i),
                     points.begin() + static_cast<ptrdiff_t>(end),
                     [&](auto a, auto b) { return combining_class(a) < combining_class(b); });
    i = end;
  }
}

// utf8proc_map would sort the marks in quadratic time, so we decompose and sort here and let it
// compose only.
std::string compose_run(std::string_view run) {
  std::vector<utf8proc_int32_t> points;
  constexpr auto kOptions = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE);
  for (size_t at = 0; at < run.size();) {
    const CodePoint point = decode_at(run, at);
    std::array<utf8proc_int32_t, 32> parts{};
    int boundary = 0;
    const auto n = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(point.value), parts.data(),
                                           parts.size(), kOptions, &boundary);
    check(n > 0 && static_cast<size_t>(n) <= parts.size(),
          "canonical decomposition of a code point");
    points.insert(points.end(), parts.begin(), parts.begin() + n);
    at += point.num_bytes;
  }
  sort_marks(points);
  const auto n =
      utf8proc_normalize_utf32(points.data(), static_cast<utf8proc_ssize_t>(points.size()),
                               static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  check(n >= 0, "canonical composition");
  std::string out;
  for (utf8proc_ssize_t i = 0; i < n; ++i)
    append(out, static_cast<char32_t>(points[static_cast<size_t>(i)]));
  return out;
}

// Appends text[begin, end) rewritten as `now` and notes the change, if it is one.
void put_edit(std::string& out, std::vector<Edit>& edits, std::string_view text, size_t begin,
              size_t end, std::string_view now) {
  if (now != text.substr(begin, end - begin))
    edits.push_back({out.size(), out.size() + now.size(), begin, end});
  out += now;
}

}  // namespace

CodePoint decode_at(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) {
    return static_cast<char32_t>(static_cast<uint8_t>(text[at + i]));
  };
  const char32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  if (lead < 0xe0) return {(lead & 0x1f) << 6 | (byte(1) & 0x3f), 2};
  if (lead < 0xf0) return {(lead & 0xf) << 12 | (byte(1) & 0x3f) << 6 | (byte(2) & 0x3f), 3};
  return {(lead & 7) << 18 | (byte(1) & 0x3f) << 12 | (byte(2) & 0x3f) << 6 | (byte(3) & 0x3f), 4};
}

CodePoint decode_before(std::string_view text, size_t end) {
  size_t begin = end - 1;
  while (begin > 0 && (static_cast<uint8_t>(text[begin]) & 0xc0) == 0x80) --begin;
  return decode_at(text, begin);
}

void append(std::string& out, char32_t value) {
  if (value < 0x80) {
    out += static_cast<char>(value);
    return;
  }
  if (value < 0x800) {
    out += static_cast<char>(0xc0 | value >> 6);
  } else {
    if (value < 0x10000) {
      out += static_cast<char>(0xe0 | value >> 12);
    } else {
      out += static_cast<char>(0xf0 | value >> 18);
      out += static_cast<char>(0x80 | (value >> 12 & 0x3f));
    }
    out += static_cast<char>(0x80 | (value >> 6 & 0x3f));
  }
  out += static_cast<char>(0x80 | (value & 0x3f));
}

size_t first_invalid(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    uint64_t word = 0;
    if (at + sizeof(word) <= text.size()) {
      std::memcpy(&word, text.data() + at, sizeof(word));
      if ((word & 0x8080808080808080ULL) == 0) {
        at += sizeof(word);
        continue;
      }
    }
    const SequenceCheck sequence = check_sequence(text, at);
    if (!sequence.valid) return at;
    at += sequence.num_bytes;
  }
  return std::string_view::npos;
}

size_t incomplete_tail(std::string_view bytes) {
  for (size_t length = 1; length <= std::min<size_t>(3, bytes.size()); ++length) {
    const size_t at = bytes.size() - length;
    if ((static_cast<uint8_t>(bytes[at]) & 0xc0) == 0x80) continue;
    const SequenceCheck sequence = check_sequence(bytes, at);
    return sequence.truncated && sequence.num_bytes == length ? length : 0;
  }
  return 0;
}

std::string lossy(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  for (size_t at = 0; at < bytes.size();) {
    const SequenceCheck sequence = check_sequence(bytes, at);
    out += sequence.valid ? bytes.substr(at, sequence.num_bytes) : std::string_view("\xef\xbf\xbd");
    at += sequence.num_bytes;
  }
  return out;
}

bool is_space(char32_t value) {
  if (value < 0x80) return value == ' ' || (value >= 9 && value <= 13);
  return value == 0x85 || value == 0xa0 || value == 0x1680 ||
         (value >= 0x2000 && value <= 0x200a) || value == 0x2028 || value == 0x2029 ||
         value == 0x202f || value == 0x205f || value == 0x3000;
}

bool is_numeric(char32_t value) {
  if (value < 0x80) return value >= '0' && value <= '9';
  const auto category = category_of(value);
  return category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL ||
         category == UTF8PROC_CATEGORY_NO || is_recent_numeric(value);
}

bool is_word(char32_t value) {
  if (value == 0x200c || value == 0x200d) return true;
  // The symbols that are Other_Alphabetic: circled and squared letters.
  if ((value >= 0x24b6 && value <= 0x24e9) || (value >= 0x1f130 && value <= 0x1f149) ||
      (value >= 0x1f150 && value <= 0x1f169) || (value >= 0x1f170 && value <= 0x1f189)) {
    return true;
  }
  switch (category_of(value)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return is_recent_word(value);
  }
}

std::string nfc(std::string_view text, std::vector<Edit>& edits) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    const CodePoint first = decode_at(text, at);
    at += first.num_bytes;
    bool alone = stands_alone(first.value);
    while (at < text.size()) {
      const CodePoint next = decode_at(text, at);
      if (!may_join_previous(next.value)) break;
      alone = false;
      at += next.num_bytes;
    }
    if (alone) {
      out += text.substr(begin, at - begin);
    } else {
      put_edit(out, edits, text, begin, at, compose_run(text.substr(begin, at - begin)));
    }
  }
  return out;
}

std::string lowercase(std::string_view text, std::vector<Edit>& edits) {
  std::string out;
  out.reserve(text.size());
  std::string lower;
  for (size_t at = 0; at < text.size();) {
    const CodePoint point = decode_at(text, at);
    lower.clear();
    if (point.value == 0x130) {
      lower = "i\xcc\x87";  // the one character whose full lower case has two code points
    } else {
      const auto known = utf8proc_tolower(static_cast<utf8proc_int32_t>(point.value));
      append(lower, recent_lower(static_cast<char32_t>(known)));
    }
    put_edit(out, edits, text, at, at + point.num_bytes, lower);
    at += point.num_bytes;
  }
  return out;
}

}  // namespace fsdp::text::unicode
