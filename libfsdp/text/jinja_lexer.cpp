#include "libfsdp/text/jinja_lexer.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>

#include "libfsdp/text/jinja_unicode.h"

namespace fsdp::text::jinja {
namespace {

[[noreturn]] void fail(int line, const std::string& what) {
  throw TemplateError(cat("line ", line, ": ", what));
}

/// Line ends become \n, and one at the very end goes away.
std::string normalize_newlines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      out += source[i];
    }
  }
  if (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

bool starts_name(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ||
         static_cast<unsigned char>(c) >= 0x80;
}
bool is_ascii_digit(char c) { return c >= '0' && c <= '9'; }
bool continues_name(char c) { return starts_name(c) || is_ascii_digit(c); }

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(normalize_newlines(source)) {}

  std::vector<Token> run() {
    while (at_ < source_.size()) lex_text();
    tokens_.push_back({TokenKind::kEnd, line_, "", {}});
    return std::move(tokens_);
  }

 private:
  bool looking_at(std::string_view what) const {
    return std::string_view(source_).substr(at_).starts_with(what);
  }

  void advance(size_t bytes) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<std::ptrdiff_t>(at_),
                                         source_.begin() + static_cast<std::ptrdiff_t>(at_ + bytes),
                                         '\n'));
    at_ += bytes;
  }

  void skip_space() {
    while (at_ < source_.size()) {
      size_t next = at_;
      if (!is_space(next_code_point(source_, next))) return;
      advance(next - at_);
    }
  }

  void push(TokenKind kind, std::string text, Value value = {}) {
    tokens_.push_back({kind, line_, std::move(text), std::move(value)});
  }

  /// Text up to a tag that begins at `tag`, stripped as the tag's sign and lstrip_blocks ask.
  void push_text(size_t tag, char sign, bool is_print) {
    std::string_view text = std::string_view(source_).substr(at_, tag - at_);
    if (sign == '-') {
      text = strip(text, false, true);
    } else if (sign != '+' && !is_print) {
      const size_t newline = text.rfind('\n');
      const size_t line_begin = newline == std::string_view::npos ? 0 : newline + 1;
      const bool begins_line = line_begin > 0 || line_starting_;
      if (begins_line && strip(text.substr(line_begin), true, false).empty())
        text = text.substr(0, line_begin);
    }
    if (!text.empty()) push(TokenKind::kText, std::string(text));
    advance(tag - at_);
  }

  size_t find_tag() const {
    for (size_t i = at_; i + 1 < source_.size(); ++i) {
      if (source_[i] == '{' &&
          (source_[i + 1] == '{' || source_[i + 1] == '%' || source_[i + 1] == '#'))
        return i;
    }
    return std::string::npos;
  }

  char sign_at(size_t at) const {
    const char c = at < source_.size() ? source_[at] : '\0';
    return c == '-' || c == '+' ? c : '\0';
  }

  void lex_text() {
    const size_t tag = find_tag();
    if (tag == std::string::npos) {
      push(TokenKind::kText, source_.substr(at_));
      at_ = source_.size();
      return;
    }
    const char kind = source_[tag + 1];
    const char sign = sign_at(tag + 2);
    push_text(tag, sign, kind == '{');
    line_starting_ = false;
    if (kind == '%' && lex_raw()) return;
    advance(sign == '\0' ? 2 : 3);
    if (kind == '#') return lex_comment();
    push(kind == '{' ? TokenKind::kPrintBegin : TokenKind::kBlockBegin, "");
    lex_tag(kind);
  }

  /// End of a tag: "+%}" keeps what follows, "-%}" strips it, "%}" takes a newline along. False:
  /// not here.
  bool take_end(std::string_view end, bool trims_newline) {
    const bool stripping = looking_at("-") && source_.compare(at_ + 1, end.size(), end) == 0;
    const bool keeping =
        trims_newline && looking_at("+") && source_.compare(at_ + 1, end.size(), end) == 0;
    if (!stripping && !keeping && !looking_at(end)) return false;
    const size_t begin = at_;
    advance(end.size() + (stripping || keeping ? 1 : 0));
    if (stripping) {
      skip_space();
    } else if (trims_newline && !keeping && looking_at("\n")) {
      advance(1);
    }
    line_starting_ = at_ > begin && source_[at_ - 1] == '\n';
    return true;
  }

  void lex_comment() {
    const int begin = line_;
    while (at_ < source_.size()) {
      if (take_end("#}", true)) return;
      advance(1);
    }
    fail(begin, "missing end of comment '#}'");
  }

  /// After "{%", optional sign: is it `word` and then the end of the tag? Returns the position of
  /// the end, or npos.
  size_t match_word_tag(size_t at, std::string_view word) const {
    at += sign_at(at) == '\0' ? 0 : 1;
    const auto skip = [&] {
      for (size_t next = at; next < source_.size(); at = next) {
        if (!is_space(next_code_point(source_, next))) break;
      }
    };
    skip();
    if (source_.compare(at, word.size(), word) != 0) return std::string::npos;
    at += word.size();
    skip();
    const std::string_view rest = std::string_view(source_).substr(at);
    const bool ends = rest.starts_with("%}") || rest.starts_with("-%}") || rest.starts_with("+%}");
    return ends ? at : std::string::npos;
  }

  bool lex_raw() {
    const size_t end = match_word_tag(at_ + 2, "raw");
    if (end == std::string::npos || source_[end] == '+') return false;
    const int begin_line = line_;
    advance(end - at_);
    take_end("%}", false);  // Jinja2 does not trim a newline after {% raw %}
    for (size_t tag = source_.find("{%", at_); tag != std::string::npos;
         tag = source_.find("{%", tag + 1)) {
      const size_t tag_end = match_word_tag(tag + 2, "endraw");
      if (tag_end == std::string::npos) continue;
      push_text(tag, sign_at(tag + 2), false);
      advance(tag_end - at_);
      take_end("%}", true);
      return true;
    }
    fail(begin_line, "missing end of raw block");
  }

  void lex_tag(char kind) {
    const bool is_print = kind == '{';
    const int begin = line_;
    std::string open;  // brackets to be closed; the end of the tag counts only outside of them
    while (at_ < source_.size()) {
      const int line = line_;
      if (open.empty() && take_end(is_print ? "}}" : "%}", !is_print)) {
        tokens_.push_back({is_print ? TokenKind::kPrintEnd : TokenKind::kBlockEnd, line, "", {}});
        return;
      }
      size_t next = at_;
      if (is_space(next_code_point(source_, next))) {
        skip_space();
      } else {
        lex_token(open);
      }
    }
    fail(begin, is_print ? "missing end of print '}}'" : "missing end of block '%}'");
  }

  void lex_token(std::string& open) {
    const char c = source_[at_];
    if (is_ascii_digit(c)) return lex_number();
    if (starts_name(c)) {
      size_t end = at_;
      while (end < source_.size() && continues_name(source_[end])) ++end;
      push(TokenKind::kName, source_.substr(at_, end - at_));
      return advance(end - at_);
    }
    if (c == '"' || c == '\'') return lex_string(c);
    constexpr std::array<std::string_view, 6> kPairs = {"//", "**", "==", "!=", ">=", "<="};
    for (const auto pair : kPairs) {
      if (!looking_at(pair)) continue;
      push(TokenKind::kOperator, std::string(pair));
      return advance(2);
    }
    if (std::string_view("+-*/%~[](){}<>=.:|,;").find(c) == std::string_view::npos) {
      fail(line_, cat("unexpected character '", c, "'"));
    }
    balance(c, open);
    push(TokenKind::kOperator, std::string(1, c));
    advance(1);
  }

  void balance(char c, std::string& open) const {
    if (c == '(') open += ')';
    if (c == '[') open += ']';
    if (c == '{') open += '}';
    if (c != ')' && c != ']' && c != '}') return;
    if (open.empty()) fail(line_, cat("unexpected '", c, "'"));
    if (open.back() != c) fail(line_, cat("unexpected '", c, "', expected '", open.back(), "'"));
    open.pop_back();
  }

  /// Digits with single underscores between them, from `at`; returns where they end.
  size_t skip_digits(size_t at, bool hexadecimal = false) const {
    const auto is_digit_here = [&](size_t i) {
      return i < source_.size() &&
             (hexadecimal ? std::isxdigit(static_cast<unsigned char>(source_[i])) != 0
                          : is_ascii_digit(source_[i]));
    };
    while (is_digit_here(at) ||
           (at < source_.size() && source_[at] == '_' && is_digit_here(at + 1)))
      ++at;
    return at;
  }

  void lex_number() {
    const bool after_dot = at_ > 0 && source_[at_ - 1] == '.';
    size_t end = skip_digits(at_);
    bool is_float = false;
    int base = 10;
    const char letter =
        end == at_ + 1 && source_[at_] == '0' && end < source_.size() ? source_[end] : '\0';
    if (letter == 'x' || letter == 'o' || letter == 'b') {
      base = letter == 'x' ? 16 : letter == 'o' ? 8 : 2;
      end = skip_digits(end + 1, letter == 'x');
    } else if (!after_dot) {
      const size_t fraction =
          end < source_.size() && source_[end] == '.' ? skip_digits(end + 1) : end;
      if (fraction > end + 1) {
        end = fraction;
        is_float = true;
      }
      const size_t exponent = skip_exponent(end);
      is_float = is_float || exponent > end;
      end = exponent;
    }
    std::string digits = source_.substr(at_, end - at_);
    std::erase(digits, '_');
    push_number(base == 10 ? digits : digits.substr(2), base, is_float);
    advance(end - at_);
  }

  size_t skip_exponent(size_t at) const {
    if (at >= source_.size() || (source_[at] != 'e' && source_[at] != 'E')) return at;
    const size_t digits = at + 1 + (sign_at(at + 1) == '\0' ? 0 : 1);
    const size_t end = skip_digits(digits);
    return end > digits ? end : at;
  }

  void push_number(const std::string& digits, int base, bool is_float) {
    if (is_float) return push(TokenKind::kNumber, digits, std::strtod(digits.c_str(), nullptr));
    int64_t number = 0;
    const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), number, base);
    if (result.ec != std::errc() || result.ptr != digits.data() + digits.size()) {
      fail(line_, cat("'", digits, "' is not an integer of 64 bits"));
    }
    push(TokenKind::kNumber, digits, number);
  }

  void lex_string(char quote) {
    size_t end = at_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) fail(line_, "a string is not closed");
    push(TokenKind::kString, unescape(std::string_view(source_).substr(at_ + 1, end - at_ - 1)));
    advance(end + 1 - at_);
  }

  std::string unescape(std::string_view text) const {
    constexpr std::string_view kLetters = "\\'\"abfnrtv";
    constexpr std::string_view kMeanings = "\\'\"\a\b\f\n\r\t\v";
    std::string out;
    for (size_t i = 0; i < text.size(); ++i) {
      if (text[i] != '\\' || i + 1 >= text.size()) {
        out += text[i];
        continue;
      }
      const char letter = text[++i];
      if (const size_t known = kLetters.find(letter); known != std::string_view::npos) {
        out += kMeanings[known];
      } else if (letter == 'x' || letter == 'u' || letter == 'U') {
        append_utf8(out, read_code(text, i, letter == 'x' ? 2 : letter == 'u' ? 4 : 8, 16));
      } else if (letter >= '0' && letter <= '7') {
        size_t digits = 1;
        while (digits < 3 && i + digits < text.size() && text[i + digits] >= '0' &&
               text[i + digits] <= '7')
          ++digits;
        --i;
        append_utf8(out, read_code(text, i, digits, 8));
      } else if (letter != '\n') {  // a backslash at the end of a line joins the lines; others stay
                                    // as they are
        out += '\\';
        out += letter;
      }
    }
    return out;
  }

  /// The number after text[i]; leaves i at its last digit.
  char32_t read_code(std::string_view text, size_t& i, size_t digits, int base) const {
    const std::string_view number = text.substr(i + 1, digits);
    uint32_t code = 0;
    const auto result = std::from_chars(number.data(), number.data() + number.size(), code, base);
    if (number.size() < digits || result.ptr != number.data() + number.size() || code > 0x10FFFF ||
        (code >= 0xD800 && code < 0xE000)) {
      fail(line_, cat("broken escape in string: \\", std::string(text.substr(i, digits + 1))));
    }
    i += digits;
    return code;
  }

  std::string source_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) { return Lexer(source).run(); }

}  // namespace fsdp::text::jinja
