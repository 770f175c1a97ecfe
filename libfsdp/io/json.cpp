#include "libfsdp/io/json.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "libfsdp/io/file.h"

namespace fsdp::io {

/// Receives nlohmann's events: that parser keeps no tree of its own here, so its habits (the last
/// of repeated keys wins, 2^64 turns into a float, no limit on depth) do not reach us.
class JsonBuilder {
 public:
  explicit JsonBuilder(JsonLimits limits) : limits_(limits) {}

  bool null() { return add(Json()); }
  bool boolean(bool value) { return add(Json(value)); }
  bool number_integer(int64_t value) { return add(Json(value)); }
  bool number_unsigned(uint64_t value) { return add(Json(value)); }
  bool number_float(double value, const std::string& spelling) {
    Json number;
    number.value_ = Json::Double{value, spelling};
    return add(std::move(number));
  }
  bool string(std::string& value) { return add(Json(std::move(value))); }
  bool binary(std::vector<uint8_t>&) { return fail("binary values are not JSON"); }
  bool start_object(size_t) { return open(Json::object()); }
  bool start_array(size_t) { return open(Json::array()); }
  bool end_array() { return close(); }
  bool key(std::string& key) {
    keys_.push_back(std::move(key));
    return true;
  }
  bool end_object() {
    const std::string* repeated = repeated_key(std::get<Json::Object>(open_.back().value_));
    if (repeated != nullptr) return fail(cat("key ", json_quote(*repeated), " occurs twice"));
    return close();
  }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& error) {
    std::string_view text =
        error.what();  // "[json.exception.parse_error.101] parse error at line 1, ..."
    if (text.find("] ") != std::string_view::npos) text.remove_prefix(text.find("] ") + 2);
    return fail(text);
  }

  Json take_root() { return std::move(root_); }
  const std::string& error() const { return error_; }

 private:
  bool fail(std::string_view why) {
    if (error_.empty()) error_ = why;
    return false;
  }

  bool add(Json value) {
    if (++num_values_ > limits_.max_values) {
      return fail(cat("more than ", limits_.max_values, " values"));
    }
    if (open_.empty()) {
      root_ = std::move(value);
    } else if (auto* array = std::get_if<Json::Array>(&open_.back().value_)) {
      array->push_back(std::move(value));
    } else {
      std::get<Json::Object>(open_.back().value_)
          .push_back({std::move(keys_.back()), std::move(value)});
      keys_.pop_back();
    }
    return true;
  }

  bool open(Json container) {
    if (static_cast<int>(open_.size()) >= limits_.max_depth) {
      return fail(cat("nested deeper than ", limits_.max_depth));
    }
    open_.push_back(std::move(container));
    return true;
  }

  bool close() {
    Json container = std::move(open_.back());
    open_.pop_back();
    return add(std::move(container));
  }

  static const std::string* repeated_key(const Json::Object& members) {
    std::vector<const std::string*> keys;
    keys.reserve(members.size());
    for (const JsonMember& member : members) keys.push_back(&member.key);
    std::sort(keys.begin(), keys.end(), [](auto* a, auto* b) { return *a < *b; });
    const auto twin =
        std::adjacent_find(keys.begin(), keys.end(), [](auto* a, auto* b) { return *a == *b; });
    return twin == keys.end() ? nullptr : *twin;
  }

  JsonLimits limits_;
  int64_t num_values_ = 0;
  std::vector<Json> open_;         // Containers from the root to the innermost.
  std::vector<std::string> keys_;  // Keys that still wait for their value.
  Json root_;
  std::string error_;
};

Json::Json(Object members) : value_(std::move(members)) {}

Json Json::array(std::initializer_list<Json> values) {
  Json json;
  json.value_ = Array(values);
  return json;
}

Json Json::object(std::initializer_list<std::pair<std::string, Json>> members) {
  Json json;
  auto& object = json.value_.emplace<Object>();
  for (const auto& [key, value] : members) object.push_back({key, value});
  return json;
}

Json Json::parse(std::string_view text, std::string_view where, JsonLimits limits) {
  if (text.find('\0') != std::string_view::npos) {
    throw JsonError(cat(where, ": NUL byte at offset ", text.find('\0'), " is not JSON"));
  }
  JsonBuilder builder(limits);
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &builder)) {
    throw JsonError(cat(where, ": ", builder.error().empty() ? "not JSON" : builder.error()));
  }
  return builder.take_root();
}

Json Json::read(const std::string& path, JsonLimits limits) {
  return parse(read_text(path), path, limits);
}

void Json::set_unsigned(uint64_t value) {
  if (std::in_range<int64_t>(value)) {
    value_ = static_cast<int64_t>(value);
  } else {
    value_ = Double{static_cast<double>(value), std::to_string(value)};
  }
}

Json::Kind Json::kind() const { return static_cast<Kind>(value_.index()); }

void Json::wrong_kind(std::string_view expected) const {
  std::string shown = dump();
  if (shown.size() > 60) {
    // Cut between characters: a message is text, also when the value is not ASCII.
    size_t end = 60;
    while ((static_cast<unsigned char>(shown[end]) & 0xC0U) == 0x80U) --end;
    shown = shown.substr(0, end) + "...";
  }
  throw JsonError(cat("expected ", expected, ", got ", shown));
}

void Json::check_range(bool fits, int64_t value) {
  if (!fits) throw JsonError(cat("integer ", value, " is out of range"));
}

bool Json::as_bool() const {
  if (const bool* value = std::get_if<bool>(&value_)) return *value;
  wrong_kind("true or false");
}

int64_t Json::as_int() const {
  if (const int64_t* value = std::get_if<int64_t>(&value_)) return *value;
  wrong_kind("an integer of 64 bits");
}

double Json::as_double() const {
  if (const int64_t* value = std::get_if<int64_t>(&value_)) return static_cast<double>(*value);
  if (const Double* value = std::get_if<Double>(&value_)) return value->value;
  wrong_kind("a number");
}

const std::string& Json::as_string() const& {
  if (const std::string* value = std::get_if<std::string>(&value_)) return *value;
  wrong_kind("a string");
}

const Json::Object& Json::items() const& {
  if (const Object* value = std::get_if<Object>(&value_)) return *value;
  wrong_kind("an object");
}

const Json::Array& Json::elements() const& {
  if (const Array* value = std::get_if<Array>(&value_)) return *value;
  wrong_kind("an array");
}

size_t Json::size() const {
  if (is_array()) return elements().size();
  return is_object() ? items().size() : 0;
}

const Json& Json::element(size_t i) const {
  const Array& array = elements();
  if (i >= array.size()) throw JsonError(cat("element ", i, " of an array of ", array.size()));
  return array[i];
}

const Json* Json::find(std::string_view key) const& {
  const Object* object = std::get_if<Object>(&value_);
  if (object == nullptr) return nullptr;
  for (const JsonMember& member : *object) {
    if (member.key == key) return &member.value;
  }
  return nullptr;
}

const Json& Json::operator[](std::string_view key) const& {
  items();  // Throws unless this is an object.
  const Json* value = find(key);
  if (value == nullptr) throw JsonError(cat("key ", json_quote(key), " is missing"));
  return *value;
}

Json& Json::operator[](std::string_view key) & {
  if (is_null()) value_.emplace<Object>();
  items();
  auto& object = std::get<Object>(value_);
  for (JsonMember& member : object) {
    if (member.key == key) return member.value;
  }
  object.push_back({std::string(key), Json()});
  return object.back().value;
}

void Json::push_back(Json value) {
  if (is_null()) value_.emplace<Array>();
  elements();
  std::get<Array>(value_).push_back(std::move(value));
}

void Json::erase(std::string_view key) {
  items();
  std::erase_if(std::get<Object>(value_), [key](const JsonMember& m) { return m.key == key; });
}

bool Json::operator==(const Json& other) const {
  if (is_number() && other.is_number()) {
    return is_int() && other.is_int() ? as_int() == other.as_int()
                                      : as_double() == other.as_double();
  }
  if (kind() != other.kind()) return false;
  if (is_array()) return elements() == other.elements();
  if (is_object()) {
    return std::equal(items().begin(), items().end(), other.items().begin(), other.items().end(),
                      [](auto& a, auto& b) { return a.key == b.key && a.value == b.value; });
  }
  if (is_string()) return as_string() == other.as_string();
  return is_null() || as_bool() == other.as_bool();
}

namespace {

std::string double_text(double value) {
  if (!std::isfinite(value)) throw InternalError("JSON cannot hold NaN or infinity");
  // Plain digits where Python's repr uses them: 100000.0, but 1e-05 and 1e+16.
  const double size = std::fabs(value);
  const bool plain = size == 0 || (size >= 1e-4 && size < 1e16);
  std::array<char, 40> buffer;
  char* const last = buffer.data() + buffer.size();
  const auto format = plain ? std::chars_format::fixed : std::chars_format::scientific;
  const char* const end = std::to_chars(buffer.data(), last, value, format).ptr;
  std::string text(static_cast<const char*>(buffer.data()), end);
  if (text.find_first_of(".e") == std::string::npos)
    text += ".0";  // Or it would be read as an integer.
  return text;
}

void break_line(std::string& out, int indent, int depth) {
  if (indent < 0) return;
  out += '\n';
  out.append(static_cast<size_t>(indent) * static_cast<size_t>(depth), ' ');
}

}  // namespace

std::string json_quote(std::string_view text) {
  constexpr std::string_view kHex = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\b':
        out += "\\b";
        break;
      case '\f':
        out += "\\f";
        break;
      default:
        if (code >= 0x20) {
          out += c;
        } else {
          out += "\\u00";
          out += {kHex[code >> 4], kHex[code & 15U]};
        }
    }
  }
  return out + '"';
}

void Json::dump_to(std::string& out, int indent, int depth) const {
  switch (kind()) {
    case Kind::kNull:
      out += "null";
      return;
    case Kind::kBool:
      out += as_bool() ? "true" : "false";
      return;
    case Kind::kInt:
      out += std::to_string(as_int());
      return;
    case Kind::kDouble: {
      const Double& number = std::get<Double>(value_);
      out += number.spelling.empty() ? double_text(number.value) : number.spelling;
      return;
    }
    case Kind::kString:
      out += json_quote(as_string());
      return;
    case Kind::kArray: {
      out += '[';
      for (size_t i = 0; i < size(); ++i) {
        if (i > 0) out += ',';
        break_line(out, indent, depth + 1);
        elements()[i].dump_to(out, indent, depth + 1);
      }
      if (!empty()) break_line(out, indent, depth);
      out += ']';
      return;
    }
    case Kind::kObject: {
      out += '{';
      for (size_t i = 0; i < size(); ++i) {
        if (i > 0) out += ',';
        break_line(out, indent, depth + 1);
        out += json_quote(items()[i].key);
        out += indent < 0 ? ":" : ": ";
        items()[i].value.dump_to(out, indent, depth + 1);
      }
      if (!empty()) break_line(out, indent, depth);
      out += '}';
      return;
    }
  }
}

std::string Json::dump(int indent) const {
  std::string out;
  dump_to(out, indent, 0);
  return out;
}

}  // namespace fsdp::io
