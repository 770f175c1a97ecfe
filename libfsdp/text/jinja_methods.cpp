// Methods of str and dict that templates may call, and Python's % formatting. Lists are immutable
// in chat templates (transformers renders in an immutable sandbox), so their methods are index and
// count alone.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <span>
#include <unordered_map>

#include "libfsdp/text/jinja_runtime.h"
#include "libfsdp/text/jinja_unicode.h"

namespace fsdp::text::jinja {
namespace {

using StringMethod = Value (*)(const std::string& self, ArgReader& args);

/// White space by default; None means the default as well.
std::string chars_argument(ArgReader& args) {
  const Value chars = args.next("chars", Value::none());
  if (chars.is_none()) return "";
  if (!chars.is_string()) throw TemplateError("strip: the characters must be a string");
  return chars.string();
}

/// Words between white space; what is left over after `limit` splits keeps its outer white space.
Value split_spaces(const std::string& self, int64_t limit, bool from_right) {
  Value::List out;
  std::string_view rest = strip(self, !from_right, from_right);
  const auto first_space = [&rest] {
    size_t at = 0;
    while (at < rest.size()) {
      const size_t begin = at;
      if (is_space(next_code_point(rest, at))) return begin;
    }
    return rest.size();
  };
  const auto after_last_space = [&rest] {
    size_t after = 0;
    for (size_t at = 0; at < rest.size();) {
      if (is_space(next_code_point(rest, at))) after = at;
    }
    return after;
  };
  while (!rest.empty() && (limit < 0 || static_cast<int64_t>(out.size()) < limit)) {
    const size_t cut = from_right ? after_last_space() : first_space();
    out.emplace_back(from_right ? rest.substr(cut) : rest.substr(0, cut));
    rest = strip(from_right ? rest.substr(0, cut) : rest.substr(cut), !from_right, from_right);
  }
  if (!rest.empty()) out.emplace_back(rest);
  if (from_right) std::reverse(out.begin(), out.end());
  return Value::sequence(std::move(out));
}

Value split(const std::string& self, ArgReader& args, bool from_right) {
  const Value separator = args.next("sep", Value::none());
  const int64_t limit = args.next_int("maxsplit", -1);
  if (separator.is_none()) return split_spaces(self, limit, from_right);
  if (!separator.is_string() || separator.string().empty())
    throw TemplateError("split: empty separator");
  const std::string& sep = separator.string();
  Value::List out;
  std::string_view rest = self;
  while (limit < 0 || static_cast<int64_t>(out.size()) < limit) {
    const size_t at = from_right ? rest.rfind(sep) : rest.find(sep);
    if (at == std::string_view::npos) break;
    out.emplace_back(from_right ? rest.substr(at + sep.size()) : rest.substr(0, at));
    rest = from_right ? rest.substr(0, at) : rest.substr(at + sep.size());
  }
  out.emplace_back(rest);
  if (from_right) std::reverse(out.begin(), out.end());
  return Value::sequence(std::move(out));
}

Value split_lines(const std::string& self, ArgReader& args) {
  const bool keep_ends = args.next_bool("keepends", false);
  const auto is_break = [](char32_t c) {
    return (c >= 10 && c <= 13) || (c >= 0x1c && c <= 0x1e) || c == 0x85 || c == 0x2028 ||
           c == 0x2029;
  };
  Value::List out;
  size_t begin = 0;
  for (size_t at = 0; at < self.size();) {
    const size_t end = at;
    if (!is_break(next_code_point(self, at))) continue;
    if (self[end] == '\r' && at < self.size() && self[at] == '\n') ++at;
    out.emplace_back(self.substr(begin, (keep_ends ? at : end) - begin));
    begin = at;
  }
  if (begin < self.size()) out.emplace_back(self.substr(begin));
  return Value::sequence(std::move(out));
}

Value partition(const std::string& self, ArgReader& args, bool from_right) {
  const std::string sep = args.require_string("sep");
  if (sep.empty()) throw TemplateError("partition: empty separator");
  const size_t at = from_right ? self.rfind(sep) : self.find(sep);
  Value::List out;
  if (at == std::string::npos) {
    out = from_right ? Value::List{"", "", self} : Value::List{self, "", ""};
  } else {
    out = {self.substr(0, at), sep, self.substr(at + sep.size())};
  }
  return Value::sequence(std::move(out), SequenceKind::kTuple);
}

/// startswith / endswith: one affix or a tuple of them.
Value has_affix(const std::string& self, ArgReader& args, bool at_end) {
  const Value affix = args.require("affix");
  const auto matches = [&](const Value& one) {
    if (!one.is_string())
      throw TemplateError("startswith/endswith needs a string or a tuple of strings");
    return at_end ? self.ends_with(one.string()) : self.starts_with(one.string());
  };
  if (affix.is_sequence(SequenceKind::kTuple)) {
    return std::any_of(affix.items().begin(), affix.items().end(), matches);
  }
  return matches(affix);
}

/// Code point index of `what` in self[start:end], or -1.
int64_t find_index(const std::string& self, ArgReader& args, bool from_right) {
  const auto codes = to_utf32(self);
  const auto what = to_utf32(args.require_string("sub"));
  const auto size = static_cast<int64_t>(codes.size());
  const auto bound = [&](int64_t at) {
    return std::clamp<int64_t>(at < 0 ? at + size : at, 0, size);
  };
  const int64_t begin = bound(args.next_int("start", 0));
  const int64_t end = std::max(begin, bound(args.next_int("end", size)));
  const auto window = std::u32string_view(codes).substr(static_cast<size_t>(begin),
                                                        static_cast<size_t>(end - begin));
  const size_t at = from_right ? window.rfind(what) : window.find(what);
  return at == std::u32string_view::npos ? -1 : begin + static_cast<int64_t>(at);
}

Value replace(const std::string& self, ArgReader& args) {
  const std::string from = args.require_string("old");
  const std::string to = args.require_string("new");
  int64_t left = args.next_int("count", -1);
  std::string out;
  size_t at = 0;
  while (left != 0 && at <= self.size()) {
    const size_t hit = self.find(from, at);
    if (hit == std::string::npos) break;
    append_bounded(out, std::string_view(self).substr(at, hit - at));
    append_bounded(out, to);
    at = hit + from.size();
    if (from.empty()) {  // between all characters
      if (at >= self.size()) return out;
      size_t next = at;
      next_code_point(self, next);
      append_bounded(out, std::string_view(self).substr(at, next - at));
      at = next;
    }
    --left;
  }
  append_bounded(out, std::string_view(self).substr(std::min(at, self.size())));
  return out;
}

Value count_hits(const std::string& self, ArgReader& args) {
  const std::string what = args.require_string("sub");
  if (what.empty()) return static_cast<int64_t>(count_code_points(self)) + 1;
  int64_t hits = 0;
  for (size_t at = self.find(what); at != std::string::npos; at = self.find(what, at + what.size()))
    ++hits;
  return hits;
}

Value join(const std::string& self, ArgReader& args) {
  std::string out;
  bool first = true;
  for (const Value& item : args.require("iterable").iterate()) {
    if (!item.is_string())
      throw TemplateError(cat("join: expected strings, got '", item.type_name(), "'"));
    if (!std::exchange(first, false)) append_bounded(out, self);
    append_bounded(out, item.string());
  }
  return out;
}

/// Every letter after a non-letter is upper case, the others lower.
Value title(const std::string& self, ArgReader&) {
  std::string out;
  bool in_word = false;
  for (size_t at = 0; at < self.size();) {
    const char32_t code = next_code_point(self, at);
    append_utf8(out, in_word ? to_lower(code) : to_upper(code));
    in_word = is_upper(code) || is_lower(code);
  }
  return out;
}

Value capitalize(const std::string& self, ArgReader&) {
  if (self.empty()) return "";
  size_t at = 0;
  std::string out;
  append_utf8(out, to_upper(next_code_point(self, at)));
  return out + lower(std::string_view(self).substr(at));
}

Value swapcase(const std::string& self, ArgReader&) {
  std::string out;
  for (size_t at = 0; at < self.size();) {
    const char32_t code = next_code_point(self, at);
    append_utf8(out, is_upper(code) ? to_lower(code) : to_upper(code));
  }
  return out;
}

enum class Align { kLeft, kRight, kCenter };

Value pad(const std::string& self, ArgReader& args, Align align) {
  const int64_t width = args.next_int("width", 0);
  const std::string fill = args.next_string("fillchar", " ");
  if (count_code_points(fill) != 1) throw TemplateError("the fill must be one character");
  const int64_t size = static_cast<int64_t>(count_code_points(self));
  if (width <= size) return self;
  check_string_bytes(width * 4);
  const int64_t missing = width - size;
  // Python's center puts the odd one left when the width is odd.
  const int64_t left = align == Align::kLeft    ? 0
                       : align == Align::kRight ? missing
                                                : missing / 2 + (missing & width & 1);
  std::string out;
  for (int64_t i = 0; i < left; ++i) out += fill;
  out += self;
  for (int64_t i = left; i < missing; ++i) out += fill;
  return out;
}

Value zero_fill(const std::string& self, ArgReader& args) {
  const int64_t width = args.next_int("width", 0);
  check_string_bytes(width);
  const auto size = static_cast<int64_t>(count_code_points(self));
  if (width <= size) return self;
  const std::string zeros(static_cast<size_t>(width - size), '0');
  const bool has_sign = !self.empty() && (self[0] == '-' || self[0] == '+');
  return has_sign ? self[0] + zeros + self.substr(1) : zeros + self;
}

template <bool (*kKind)(char32_t)>
Value all_are(const std::string& self, ArgReader&) {
  for (size_t at = 0; at < self.size();) {
    if (!kKind(next_code_point(self, at))) return false;
  }
  return !self.empty();
}

bool is_alnum(char32_t code) { return is_alpha(code) || is_digit(code); }

/// isupper / islower: letters with case are all of that case, and there is one.
template <bool (*kWanted)(char32_t), bool (*kOther)(char32_t)>
Value has_case(const std::string& self, ArgReader&) {
  bool found = false;
  for (size_t at = 0; at < self.size();) {
    const char32_t code = next_code_point(self, at);
    if (kOther(code)) return false;
    found = found || kWanted(code);
  }
  return found;
}

Value remove_affix(const std::string& self, ArgReader& args, bool at_end) {
  const std::string affix = args.require_string("affix");
  if (at_end && !affix.empty() && self.ends_with(affix))
    return self.substr(0, self.size() - affix.size());
  if (!at_end && self.starts_with(affix)) return self.substr(affix.size());
  return self;
}

/// "{} {0} {name}" without conversions and format specifications.
Value format(const std::string& self, ArgReader& args) {
  const std::vector<Value> positional = args.rest();
  const auto named = args.rest_named();
  std::string out;
  size_t automatic = 0;
  for (size_t at = 0; at < self.size(); ++at) {
    const char c = self[at];
    if ((c == '{' || c == '}') && at + 1 < self.size() && self[at + 1] == c) {
      out += c;
      ++at;
    } else if (c == '{') {
      const size_t end = self.find('}', at);
      if (end == std::string::npos) throw TemplateError("format: '{' is not closed");
      const std::string field = self.substr(at + 1, end - at - 1);
      if (field.find_first_of(":!.[") != std::string::npos) {
        throw TemplateError(
            cat("format: only {}, {0} and {name} are supported, got {", field, "}"));
      }
      Value value = Value::undefined("");
      const bool is_index =
          field.find_first_not_of("0123456789") == std::string::npos && field.size() < 6;
      const size_t index = field.empty() ? automatic++
                           : is_index    ? std::stoul(field)
                                         : positional.size();
      if (index < positional.size()) value = positional[index];
      for (const auto& [name, candidate] : named) value = name == field ? candidate : value;
      if (value.is_undefined()) throw TemplateError(cat("format: no argument for {", field, "}"));
      append_bounded(out, to_text(value));
      at = end;
    } else {
      out += c;
    }
  }
  return out;
}

const std::unordered_map<std::string_view, StringMethod>& string_methods() {
  using S = const std::string&;
  using A = ArgReader&;
  static const std::unordered_map<std::string_view, StringMethod> kMethods = {
      {"upper", [](S s, A) { return Value(upper(s)); }},
      {"lower", [](S s, A) { return Value(lower(s)); }},
      {"casefold", [](S s, A) { return Value(lower(s)); }},
      {"strip", [](S s, A a) { return Value(strip(s, true, true, chars_argument(a))); }},
      {"lstrip", [](S s, A a) { return Value(strip(s, true, false, chars_argument(a))); }},
      {"rstrip", [](S s, A a) { return Value(strip(s, false, true, chars_argument(a))); }},
      {"split", [](S s, A a) { return split(s, a, false); }},
      {"rsplit", [](S s, A a) { return split(s, a, true); }},
      {"splitlines", split_lines},
      {"partition", [](S s, A a) { return partition(s, a, false); }},
      {"rpartition", [](S s, A a) { return partition(s, a, true); }},
      {"startswith", [](S s, A a) { return has_affix(s, a, false); }},
      {"endswith", [](S s, A a) { return has_affix(s, a, true); }},
      {"removeprefix", [](S s, A a) { return remove_affix(s, a, false); }},
      {"removesuffix", [](S s, A a) { return remove_affix(s, a, true); }},
      {"find", [](S s, A a) { return Value(find_index(s, a, false)); }},
      {"rfind", [](S s, A a) { return Value(find_index(s, a, true)); }},
      {"index",
       [](S s, A a) {
         const int64_t at = find_index(s, a, false);
         if (at < 0) throw TemplateError("index: substring not found");
         return Value(at);
       }},
      {"count", count_hits},
      {"replace", replace},
      {"join", join},
      {"title", title},
      {"capitalize", capitalize},
      {"swapcase", swapcase},
      {"ljust", [](S s, A a) { return pad(s, a, Align::kLeft); }},
      {"rjust", [](S s, A a) { return pad(s, a, Align::kRight); }},
      {"center", [](S s, A a) { return pad(s, a, Align::kCenter); }},
      {"zfill", zero_fill},
      {"isalpha", all_are<is_alpha>},
      {"isdigit", all_are<is_digit>},
      {"isdecimal", all_are<is_digit>},
      {"isnumeric", all_are<is_digit>},
      {"isalnum", all_are<is_alnum>},
      {"isspace", all_are<is_space>},
      {"isupper", has_case<is_upper, is_lower>},
      {"islower", has_case<is_lower, is_upper>},
      {"format", format},
  };
  return kMethods;
}

/// Methods that Python's str has and this engine has not: there, but an error to call.
constexpr std::array<std::string_view, 9> kOtherStringMethods = {
    "encode",      "expandtabs", "format_map", "isascii",  "isidentifier",
    "isprintable", "istitle",    "maketrans",  "translate"};
constexpr std::array<std::string_view, 5> kDictMethods = {"get", "items", "keys", "values", "copy"};
constexpr std::array<std::string_view, 3> kListMethods = {"index", "count", "copy"};
constexpr std::array<std::string_view, 5> kDictMutators = {"clear", "pop", "popitem", "setdefault",
                                                           "update"};
constexpr std::array<std::string_view, 8> kListMutators = {"append", "extend", "insert", "pop",
                                                           "remove", "clear",  "sort",   "reverse"};

bool is_one_of(std::span<const std::string_view> names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

Value call_dict_method(const Value& self, const std::string& name, ArgReader& args) {
  Value::List out;
  if (name == "copy") return self;
  if (name == "get") {
    const Value key = args.require("key");
    const Value fallback = args.next("default", Value::none());
    const Value* found = self.find_key(key);
    return found != nullptr ? *found : fallback;
  }
  for (const auto& [key, item] : self.pairs()) {
    if (name == "keys") out.push_back(key);
    if (name == "values") out.push_back(item);
    if (name == "items") out.push_back(Value::sequence({key, item}, SequenceKind::kTuple));
  }
  const auto kind = name == "keys"     ? SequenceKind::kKeys
                    : name == "values" ? SequenceKind::kValues
                                       : SequenceKind::kItems;
  return Value::sequence(std::move(out), kind);
}

Value call_list_method(const Value& self, const std::string& name, ArgReader& args) {
  if (name == "copy") return self;
  const Value wanted = args.require("value");
  const auto matches = [&](const Value& item) { return equal(item, wanted); };
  const auto& items = self.items();
  if (name == "count")
    return static_cast<int64_t>(std::count_if(items.begin(), items.end(), matches));
  const auto found = std::find_if(items.begin(), items.end(), matches);
  if (found == items.end()) throw TemplateError("index: the value is not in the list");
  return static_cast<int64_t>(found - items.begin());
}

/// Largest number in a conversion: its width or precision.
long widest_number(const std::string& spec) {
  long widest = 0;
  for (size_t at = 0; at < spec.size(); ++at) {
    if (spec[at] < '1' || spec[at] > '9') continue;
    widest = std::max(widest, std::strtol(&spec[at], nullptr, 10));
    while (at + 1 < spec.size() && spec[at + 1] >= '0' && spec[at + 1] <= '9') ++at;
  }
  return widest;
}

/// One %-conversion: flags, width and precision go to printf as they are.
std::string convert_one(const std::string& spec, char kind, const Value& value) {
  if (kind == 's' || kind == 'r') {
    std::string text = kind == 's' ? to_text(value) : repr(value);
    const size_t dot = spec.find('.');
    if (dot != std::string::npos)
      text.resize(std::min<size_t>(text.size(), std::strtoul(&spec[dot + 1], nullptr, 10)));
    const long width =
        std::labs(std::strtol(&spec[1 + (spec.size() > 1 && spec[1] == '-')], nullptr, 10));
    if (static_cast<long>(text.size()) < width) {
      text.insert(spec[1] == '-' ? text.size() : 0, static_cast<size_t>(width) - text.size(), ' ');
    }
    return text;
  }
  if (!value.is_number())
    throw TemplateError(cat("%", kind, " needs a number, got '", value.type_name(), "'"));
  char buffer[512];
  if (kind == 'f' || kind == 'e' || kind == 'g' || kind == 'F' || kind == 'E' || kind == 'G') {
    std::snprintf(buffer, sizeof(buffer), (spec + kind).c_str(), value.number());
  } else {
    const auto integer = value.is_float() ? static_cast<int64_t>(value.number()) : value.integer();
    std::snprintf(buffer, sizeof(buffer), (spec + "l" + (kind == 'i' ? 'd' : kind)).c_str(),
                  integer);
  }
  return buffer;
}

}  // namespace

bool has_method(const Value& self, std::string_view name) {
  if (self.is_string())
    return string_methods().contains(name) || is_one_of(kOtherStringMethods, name);
  if (self.is_mapping()) return is_one_of(kDictMethods, name) || is_one_of(kDictMutators, name);
  if (self.is_sequence(SequenceKind::kList))
    return is_one_of(kListMethods, name) || is_one_of(kListMutators, name);
  if (self.is_sequence(SequenceKind::kTuple)) return name == "index" || name == "count";
  return false;
}

Value call_method(const Value& self, const std::string& name, const Arguments& arguments) {
  ArgReader args(name, arguments);
  Value result;
  if (self.is_string() && !string_methods().contains(name)) {
    throw TemplateError(cat("the method '", name, "' of strings is not supported"));
  } else if (self.is_string()) {
    result = string_methods().at(name)(self.string(), args);
  } else if (is_one_of(self.is_mapping() ? std::span<const std::string_view>(kDictMutators)
                                         : kListMutators,
                       name)) {
    throw TemplateError(
        cat("'", name, "' is not available: lists and dicts are immutable in chat templates"));
  } else {
    result =
        self.is_mapping() ? call_dict_method(self, name, args) : call_list_method(self, name, args);
  }
  args.finish();
  return result;
}

std::string percent_format(std::string_view format, const Value& arguments) {
  const bool is_tuple = arguments.is_sequence(SequenceKind::kTuple);
  const Value::List values = is_tuple ? arguments.items() : Value::List{arguments};
  std::string out;
  size_t used = 0;
  for (size_t at = 0; at < format.size(); ++at) {
    if (format[at] != '%') {
      out += format[at];
      continue;
    }
    const size_t end = format.find_first_not_of("-+ 0#.123456789", at + 1);
    if (end == std::string_view::npos) throw TemplateError("incomplete % conversion");
    const char kind = format[end];
    const std::string spec(format.substr(at, end - at));
    at = end;
    if (kind == '%') {
      out += '%';
      continue;
    }
    if (std::string_view("srdifegxoFEGX").find(kind) == std::string_view::npos ||
        spec.size() > 12) {
      throw TemplateError(cat("the conversion ", spec, kind, " is not supported"));
    }
    if (widest_number(spec) > 200) throw TemplateError("a % conversion is too wide");
    if (used >= values.size()) throw TemplateError("not enough arguments for the % conversions");
    append_bounded(out, convert_one(spec, kind, values[used++]));
  }
  if (is_tuple && used < values.size())
    throw TemplateError("not all arguments are used by the % conversions");
  return out;
}

}  // namespace fsdp::text::jinja
