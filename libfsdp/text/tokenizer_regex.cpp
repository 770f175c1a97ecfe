#include "libfsdp/text/tokenizer_regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>

#include "libfsdp/base/error.h"
#include "libfsdp/text/unicode.h"
#include "libfsdp/text/unicode_tables.h"

namespace fsdp::text {
namespace {

constexpr size_t kMaxPatternBytes = 64 << 10;
constexpr size_t kJitStackBytes = 4 << 20;
constexpr uint32_t kMatchLimit = 20'000'000;
constexpr uint32_t kHeapLimitKib = 256 << 10;

// PCRE2 counts U+180E as a space and Oniguruma does not, so \s is spelled out. Classes without
// their brackets:
constexpr std::string_view kSpaceClass = R"(\x09-\x0d\x{85}\p{Z})";
// Oniguruma counts the superscripts and fractions of Latin-1 as word characters.
constexpr std::string_view kWordClass =
    R"(\x{b2}\x{b3}\x{b9}\x{bc}-\x{be}\p{Nl}\p{Pc}\x{24b6}-\x{24e9}\x{1f130}-\x{1f149}\x{1f150}-\x{1f169}\x{1f170}-\x{1f189})";

// Inside of a class for a property by its name: a general category or, else, a script. PCRE2's
// \p{Han} alone would be the script's extensions, Oniguruma's is the script.
std::string property_class(std::string_view name) {
  constexpr std::string_view kCategories =
      " L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So Z Zs Zl Zp C "
      "Cc Cf Cn Co Any ";
  const bool category = kCategories.find(cat(' ', name, ' ')) != std::string_view::npos;
  return cat(R"(\p{)", category ? "" : "sc:", name, '}', unicode::recent_characters(name));
}

const std::string& word_class() {
  static const std::string kClass =
      cat(kWordClass, property_class("L"), property_class("M"), property_class("Nd"));
  return kClass;
}

// Walks an Oniguruma pattern and writes the PCRE2 one.
class Translator {
 public:
  explicit Translator(std::string_view pattern) : pattern_(pattern) {}

  std::string run() {
    while (at_ < pattern_.size()) step();
    if (in_class_) refuse("a class without its closing bracket");
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(std::string_view what) const {
    throw ModelError(cat("[tokenizer] regular expression '", pattern_, "' holds ", what,
                         " near byte ", at_, ", which libfsdp does not translate."));
  }

  char peek(size_t ahead) const {
    return at_ + ahead < pattern_.size() ? pattern_[at_ + ahead] : '\0';
  }

  void step() {
    const char c = pattern_[at_];
    if (c == '\\') return escape();
    if (in_class_) return class_character(c);
    if (c == '[') return open_class();
    if (c == '(' && peek(1) == '?') return group_flags();
    if (c == '}' && peek(1) == '+' && closes_interval()) refuse("'{n,m}+'");
    copy(1);
  }

  void copy(size_t n) {
    out_ += pattern_.substr(at_, n);
    at_ += n;
  }

  void replace(size_t n, std::string_view text) {
    out_ += text;
    at_ += n;
  }

  // True when the '}' here ends something like {1,3}; otherwise it is a plain character or ends
  // \p{..} or \x{..}.
  bool closes_interval() const {
    const size_t open = pattern_.rfind('{', at_);
    if (open == std::string_view::npos || open == 0) return false;
    const std::string_view inside = pattern_.substr(open + 1, at_ - open - 1);
    const bool digits =
        !inside.empty() && inside.find_first_not_of("0123456789,") == std::string_view::npos;
    const bool escape = open >= 2 && pattern_[open - 2] == '\\' && (pattern_[open - 1] == 'x');
    return digits && !escape;
  }

  void open_class() {
    in_class_ = true;
    copy(peek(1) == '^' ? 2 : 1);
    if (at_ < pattern_.size() && pattern_[at_] == ']')
      copy(1);  // a bracket in the first place is a character
  }

  void class_character(char c) {
    if (c == '&' && peek(1) == '&') refuse("an intersection of classes");
    if (c == '[' && peek(1) == ':') {
      const size_t end = pattern_.find(":]", at_ + 2);
      if (end == std::string_view::npos) refuse("an unfinished [:name:]");
      return copy(end + 2 - at_);
    }
    if (c == '[') refuse("a class inside a class");
    if (c == ']') in_class_ = false;
    copy(1);
  }

  // In Ruby's syntax the flag m lets the dot match a line end, which is s in PCRE2.
  void group_flags() {
    copy(2);
    size_t end = at_;
    while (end < pattern_.size() &&
           std::string_view("imx-").find(pattern_[end]) != std::string_view::npos)
      ++end;
    if (end == at_ || end >= pattern_.size() || (pattern_[end] != ':' && pattern_[end] != ')'))
      return;
    for (; at_ < end; ++at_) out_ += pattern_[at_] == 'm' ? 's' : pattern_[at_];
  }

  void escape() {
    const char name = peek(1);
    switch (name) {
      case 's':
        return in_class_ ? replace(2, kSpaceClass) : replace(2, cat("[", kSpaceClass, "]"));
      case 'S':
        return in_class_ ? replace(2, R"(\S\x{180e})") : replace(2, cat("[^", kSpaceClass, "]"));
      case 'w':
        return in_class_ ? replace(2, word_class()) : replace(2, cat("[", word_class(), "]"));
      case 'W':
        if (in_class_) refuse("\\W inside a class");
        return replace(2, cat("[^", word_class(), "]"));
      case 'd':
        return in_class_ ? replace(2, property_class("Nd"))
                         : replace(2, cat("[", property_class("Nd"), "]"));
      case 'D':
        if (in_class_) refuse("\\D inside a class");
        return replace(2, cat("[^", property_class("Nd"), "]"));
      case 'p':
      case 'P':
        return property(name == 'P');
      case 'h':
        return in_class_ ? replace(2, "0-9a-fA-F") : replace(2, "[0-9a-fA-F]");
      case 'H':
        if (in_class_) refuse("\\H inside a class");
        return replace(2, "[^0-9a-fA-F]");
      case 'b':
        return in_class_ ? copy(2) : word_boundary("(?:(?<=W)(?!W)|(?<!W)(?=W))");
      case 'B':
        return word_boundary("(?:(?<=W)(?=W)|(?<!W)(?!W))");
      case '\0':
        refuse("a lone backslash");
      default:
        return other_escape();
    }
  }

  void word_boundary(std::string_view shape) {
    std::string text;
    for (const char c : shape) c == 'W' ? text += cat("[", word_class(), "]") : text += c;
    replace(2, text);
  }

  void property(bool negated) {
    const size_t end = pattern_.find('}', at_);
    if (peek(2) != '{' || end == std::string_view::npos) refuse("a property without its braces");
    std::string_view name = pattern_.substr(at_ + 3, end - at_ - 3);
    if (name.starts_with('^')) {
      negated = !negated;
      name.remove_prefix(1);
    }
    const std::string inside = property_class(name);
    const size_t n = end + 1 - at_;
    if (in_class_ && negated) refuse("a negated property inside a class");
    replace(n, in_class_ ? inside : cat(negated ? "[^" : "[", inside, "]"));
  }

  // \x{..} is copied with its braces; any other escape is two characters.
  void other_escape() {
    if (peek(2) != '{') return copy(2);
    const size_t end = pattern_.find('}', at_);
    if (peek(1) != 'x' || end == std::string_view::npos) return copy(2);
    copy(end + 1 - at_);
  }

  std::string_view pattern_;
  std::string out_;
  size_t at_ = 0;
  bool in_class_ = false;
};

std::string pcre_message(int code) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

// What a match needs beside the code. One per thread, kept for its lifetime.
struct MatchScratch {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(32 << 10, kJitStackBytes, nullptr);

  MatchScratch() {
    if (data == nullptr || context == nullptr || stack == nullptr) {
      throw HostResourceError("[tokenizer] no memory for a regular expression's stack.");
    }
    pcre2_set_match_limit(context, kMatchLimit);
    pcre2_set_heap_limit(context, kHeapLimitKib);
    pcre2_jit_stack_assign(context, nullptr, stack);
  }
  MatchScratch(const MatchScratch&) = delete;
  MatchScratch& operator=(const MatchScratch&) = delete;
  ~MatchScratch() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
};

MatchScratch& scratch() {
  static thread_local MatchScratch instance;
  return instance;
}

}  // namespace

struct Regex::Code {
  pcre2_code* compiled = nullptr;
  bool jit = false;

  Code() = default;
  Code(const Code&) = delete;
  Code& operator=(const Code&) = delete;
  ~Code() { pcre2_code_free(compiled); }
};

std::string pcre_from_oniguruma(std::string_view pattern) { return Translator(pattern).run(); }

std::string escape_regex(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (std::string_view(R"(\.+*?()|[]{}^$#&-~ )").find(c) != std::string_view::npos) out += '\\';
    out += c;
  }
  return out;
}

Regex::Regex(std::string_view pattern) : pattern_(pattern) {
  if (pattern.size() > kMaxPatternBytes) {
    throw ModelError(cat("[tokenizer] a regular expression of ", pattern.size(),
                         " bytes; the limit is ", kMaxPatternBytes, "."));
  }
  const std::string translated = pcre_from_oniguruma(pattern);
  auto code = std::make_shared<Code>();
  int error = 0;
  PCRE2_SIZE where = 0;
  // Oniguruma's Ruby syntax lets ^ and $ match at every line.
  const uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
  code->compiled = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                                 options, &error, &where, nullptr);
  if (code->compiled == nullptr) {
    throw ModelError(cat("[tokenizer] regular expression '", pattern, "' does not compile: ",
                         pcre_message(error), " at byte ", where, " of '", translated, "'."));
  }
  code->jit = pcre2_jit_compile(code->compiled, PCRE2_JIT_COMPLETE) == 0;
  code_ = std::move(code);
}

std::optional<ByteSpan> Regex::find(std::string_view text, size_t from) const {
  MatchScratch& use = scratch();
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const auto match = code_->jit ? &pcre2_jit_match : &pcre2_match;
  int rc =
      match(code_->compiled, subject, text.size(), from, PCRE2_NO_UTF_CHECK, use.data, use.context);
  if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter keeps its stack on the heap
    rc = pcre2_match(code_->compiled, subject, text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                     use.data, use.context);
  }
  if (rc == PCRE2_ERROR_NOMATCH) return std::nullopt;
  if (rc < 0) {
    throw DataError(cat("[tokenizer] regular expression '", pattern_, "' gave up on a text of ",
                        text.size(), " bytes: ", pcre_message(rc), ". Hint: split the text."));
  }
  const PCRE2_SIZE* span = pcre2_get_ovector_pointer(use.data);
  return ByteSpan{span[0], span[1]};
}

std::optional<ByteSpan> RegexMatches::next() {
  while (from_ <= text_.size()) {
    const auto match = regex_.find(text_, from_);
    if (!match) break;
    if (match->begin == match->end && match->end == last_end_) {
      from_ += from_ < text_.size() ? unicode::decode_at(text_, from_).num_bytes : 1;
      continue;
    }
    from_ = last_end_ = match->end;
    return match;
  }
  from_ = text_.size() + 1;
  return std::nullopt;
}

}  // namespace fsdp::text
