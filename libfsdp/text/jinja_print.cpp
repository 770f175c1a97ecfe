// Printing of values as Python does it: str, repr, json.dumps.
#include <algorithm>
#include <charconv>
#include <cmath>

#include "libfsdp/text/jinja_unicode.h"
#include "libfsdp/text/jinja_value.h"

namespace fsdp::text::jinja {
namespace {

std::string hex(char32_t code, int digits) {
  std::string out(static_cast<size_t>(digits), '0');
  for (int i = digits - 1; i >= 0; --i, code >>= 4)
    out[static_cast<size_t>(i)] = "0123456789abcdef"[code & 15];
  return out;
}

std::string string_repr(std::string_view text) {
  const bool has_single = text.find('\'') != std::string_view::npos;
  const bool has_double = text.find('"') != std::string_view::npos;
  const char quote = has_single && !has_double ? '"' : '\'';
  std::string out(1, quote);
  for (size_t at = 0; at < text.size();) {
    const char32_t code = next_code_point(text, at);
    if (code == static_cast<char32_t>(quote) || code == '\\') {
      out += '\\';
      out += static_cast<char>(code);
    } else if (code == '\n' || code == '\r' || code == '\t') {
      out += code == '\n' ? "\\n" : code == '\r' ? "\\r" : "\\t";
    } else if (is_printable(code)) {
      append_utf8(out, code);
    } else if (code < 0x100) {
      out += "\\x" + hex(code, 2);
    } else {
      out += code < 0x10000 ? "\\u" + hex(code, 4) : "\\U" + hex(code, 8);
    }
  }
  return out + quote;
}

std::string sequence_repr(const Value& value) {
  std::string body;
  for (const auto& item : value.items()) {
    if (!body.empty()) body += ", ";
    body += repr(item);
  }
  switch (value.sequence().kind) {
    case SequenceKind::kTuple:
      return cat("(", body, value.items().size() == 1 ? ",)" : ")");
    case SequenceKind::kList:
      return cat("[", body, "]");
    case SequenceKind::kGenerator:
      return "<generator>";
    default:
      return cat(value.type_name(), "([", body, "])");
  }
}

std::string mapping_repr(const Value& value) {
  std::string out = "{";
  for (const auto& [key, item] : value.pairs()) {
    if (out.size() > 1) out += ", ";
    out += repr(key) + ": " + repr(item);
  }
  return out + "}";
}

class JsonWriter {
 public:
  explicit JsonWriter(const JsonStyle& style) : style_(style) {}

  std::string take() { return std::move(out_); }

  void write(const Value& value) {
    if (value.is_none()) {
      out_ += "null";
    } else if (value.is_bool()) {
      out_ += value.truthy() ? "true" : "false";
    } else if (value.is_int()) {
      out_ += std::to_string(value.integer());
    } else if (value.is_float()) {
      write_float(value.number());
    } else if (value.is_string()) {
      write_string(value.string());
    } else if (value.is_sequence(SequenceKind::kList) || value.is_sequence(SequenceKind::kTuple)) {
      write_list(value.items());
    } else if (value.is_mapping()) {
      write_dict(value.pairs());
    } else {
      throw TemplateError(
          cat("tojson: a value of type '", value.type_name(), "' has no JSON form"));
    }
  }

 private:
  void write_float(double number) {
    if (std::isnan(number)) {
      out_ += "NaN";
    } else if (std::isinf(number)) {
      out_ += number > 0 ? "Infinity" : "-Infinity";
    } else {
      out_ += float_text(number);
    }
  }

  void write_string(std::string_view text) {
    out_ += '"';
    for (size_t at = 0; at < text.size();) write_character(next_code_point(text, at));
    out_ += '"';
  }

  void write_character(char32_t code) {
    constexpr std::string_view kNamed = "\"\\\n\r\t\f\b";
    constexpr std::string_view kLetters = "\"\\nrtfb";
    const size_t named =
        code < 0x80 ? kNamed.find(static_cast<char>(code)) : std::string_view::npos;
    if (named != std::string_view::npos) {
      out_ += '\\';
      out_ += kLetters[named];
    } else if (code >= 0x10000 && style_.ensure_ascii) {
      const char32_t rest = code - 0x10000;
      out_ += "\\u" + hex(0xD800 + (rest >> 10), 4) + "\\u" + hex(0xDC00 + (rest & 0x3FF), 4);
    } else if (code < 0x20 || (code >= 0x7f && style_.ensure_ascii && code != 0x7f)) {
      out_ += "\\u" + hex(code, 4);
    } else {
      append_utf8(out_, code);
    }
  }

  void newline() {
    if (!style_.indented) return;
    out_ += '\n';
    for (int i = 0; i < level_; ++i) out_ += style_.indent;
  }

  void write_list(const Value::List& items) {
    if (items.empty()) {
      out_ += "[]";
      return;
    }
    out_ += '[';
    ++level_;
    for (size_t i = 0; i < items.size(); ++i) {
      if (i > 0) out_ += style_.item_separator;
      newline();
      write(items[i]);
    }
    --level_;
    newline();
    out_ += ']';
  }

  void write_dict(Value::Dict pairs) {
    if (pairs.empty()) {
      out_ += "{}";
      return;
    }
    if (style_.sort_keys) {
      std::stable_sort(pairs.begin(), pairs.end(),
                       [](const auto& a, const auto& b) { return less(a.first, b.first); });
    }
    out_ += '{';
    ++level_;
    for (size_t i = 0; i < pairs.size(); ++i) {
      if (i > 0) out_ += style_.item_separator;
      newline();
      write_key(pairs[i].first);
      out_ += style_.key_separator;
      write(pairs[i].second);
    }
    --level_;
    newline();
    out_ += '}';
  }

  void write_key(const Value& key) {
    if (key.is_string()) return write_string(key.string());
    if (!key.is_none() && !key.is_number()) {
      throw TemplateError(cat("tojson: a key of type '", key.type_name(), "' has no JSON form"));
    }
    out_ += '"';
    write(key);
    out_ += '"';
  }

  const JsonStyle& style_;
  std::string out_;
  int level_ = 0;
};

}  // namespace

std::string float_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char buffer[64];
  const auto end =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific).ptr;
  const std::string_view all(buffer, static_cast<size_t>(end - buffer));
  const size_t e = all.find('e');
  const int exponent = std::stoi(std::string(all.substr(e + 1)));
  if (exponent < -4 || exponent >= 16) return std::string(all);
  const auto fixed_end =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::fixed).ptr;
  std::string out(buffer, fixed_end);
  if (out.find('.') == std::string::npos) out += ".0";
  return out;
}

std::string to_text(const Value& value) {
  if (value.is_undefined()) return "";
  if (value.is_string()) return value.string();
  return repr(value);
}

std::string repr(const Value& value) {
  if (value.is_undefined()) return "Undefined";
  if (value.is_none()) return "None";
  if (value.is_bool()) return value.truthy() ? "True" : "False";
  if (value.is_int()) return std::to_string(value.integer());
  if (value.is_float()) return float_text(value.number());
  if (value.is_string()) return string_repr(value.string());
  if (value.is_sequence()) return sequence_repr(value);
  if (value.is_mapping()) return mapping_repr(value);
  return value.object()->repr();
}

std::string to_json(const Value& value, const JsonStyle& style) {
  JsonWriter writer(style);
  writer.write(value);
  return writer.take();
}

}  // namespace fsdp::text::jinja
