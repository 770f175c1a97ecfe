#include "libfsdp/text/jinja_runtime.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "libfsdp/base/checked.h"
#include "libfsdp/text/jinja_unicode.h"

namespace fsdp::text::jinja {
namespace {

class BoundMethod : public Object {
 public:
  BoundMethod(Value self, std::string name) : self_(std::move(self)), name_(std::move(name)) {}
  bool callable() const override { return true; }
  Value call(const Arguments& arguments) override { return call_method(self_, name_, arguments); }
  std::string repr() const override {
    return cat("<method ", name_, " of ", self_.type_name(), ">");
  }

 private:
  Value self_;
  std::string name_;
};

int64_t unwrap(bool overflow, int64_t result) {
  if (overflow) throw TemplateError("an integer needs more than 64 bits");
  return result;
}

int64_t floor_div(int64_t a, int64_t b) {
  if (b == 0) throw TemplateError("division by zero");
  if (b == -1) {
    int64_t result = 0;
    const bool overflow = __builtin_sub_overflow(int64_t{0}, a, &result);
    return unwrap(overflow, result);
  }
  const int64_t quotient = a / b;
  return quotient - ((a % b != 0 && (a < 0) != (b < 0)) ? 1 : 0);
}

double float_mod(double a, double b) {
  if (b == 0) throw TemplateError("division by zero");
  const double rest = std::fmod(a, b);
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

int64_t integer_power(int64_t base, int64_t exponent) {
  int64_t result = 1;
  for (int64_t i = 0; i < exponent && (base < -1 || base > 1 || i < 2); ++i) {
    const bool overflow = __builtin_mul_overflow(result, base, &result);
    unwrap(overflow, 0);
  }
  if (base == -1) return exponent % 2 == 0 ? 1 : -1;
  if (base == 0) return exponent == 0 ? 1 : 0;
  return result;
}

Value integer_arithmetic(const std::string& op, int64_t a, int64_t b) {
  int64_t result = 0;
  if (op == "+") return unwrap(__builtin_add_overflow(a, b, &result), 0) + result;
  if (op == "-") return unwrap(__builtin_sub_overflow(a, b, &result), 0) + result;
  if (op == "*") return unwrap(__builtin_mul_overflow(a, b, &result), 0) + result;
  if (op == "//") return floor_div(a, b);
  if (op == "%") return b == -1 ? 0 : a - floor_div(a, b) * b;
  if (op == "**" && b >= 0) return integer_power(a, b);
  if (op == "**") return std::pow(static_cast<double>(a), static_cast<double>(b));
  if (b == 0) throw TemplateError("division by zero");
  return static_cast<double>(a) / static_cast<double>(b);
}

Value float_arithmetic(const std::string& op, double a, double b) {
  if (op == "+") return a + b;
  if (op == "-") return a - b;
  if (op == "*") return a * b;
  if (op == "%") return float_mod(a, b);
  if (op == "//") return std::floor((a - float_mod(a, b)) / b + 0.5);
  if (op == "**") return std::pow(a, b);
  if (b == 0) throw TemplateError("division by zero");
  return a / b;
}

Value repeat(const Value& value, int64_t times) {
  times = std::max<int64_t>(times, 0);
  if (value.is_string()) {
    check_string_bytes(
        checked_mul<TemplateError>(static_cast<int64_t>(value.string().size()), times, "repeat"));
    std::string out;
    for (int64_t i = 0; i < times; ++i) out += value.string();
    return out;
  }
  check_list_items(
      checked_mul<TemplateError>(static_cast<int64_t>(value.items().size()), times, "repeat"));
  Value::List out;
  for (int64_t i = 0; i < times; ++i)
    out.insert(out.end(), value.items().begin(), value.items().end());
  return Value::sequence(std::move(out), value.sequence().kind);
}

bool is_plain_sequence(const Value& value) {
  return value.is_sequence(SequenceKind::kList) || value.is_sequence(SequenceKind::kTuple);
}

struct SliceBounds {
  int64_t start, stop, step;
};

/// Python's slice.indices.
SliceBounds slice_bounds(const Value& start, const Value& stop, const Value& step, int64_t length) {
  const auto read = [](const Value& value, int64_t fallback) {
    if (value.is_none()) return fallback;
    if (!value.is_integral()) throw TemplateError("a bound of a slice must be an integer");
    return value.integer();
  };
  const int64_t by = read(step, 1);
  if (by == 0) throw TemplateError("the step of a slice must not be zero");
  const int64_t low = by > 0 ? 0 : -1;
  const int64_t high = by > 0 ? length : length - 1;
  const auto clamp = [&](int64_t at) { return std::clamp(at < 0 ? at + length : at, low, high); };
  return {start.is_none() ? (by > 0 ? low : high) : clamp(read(start, 0)),
          stop.is_none() ? (by > 0 ? high : low) : clamp(read(stop, 0)), by};
}

Value index_sequence(const Value& value, int64_t index) {
  const auto size = static_cast<int64_t>(value.items().size());
  const int64_t at = index < 0 ? index + size : index;
  if (at < 0 || at >= size)
    return Value::undefined(cat("the ", value.type_name(), " has no item ", index));
  return value.items()[static_cast<size_t>(at)];
}

Value index_string(const std::string& text, int64_t index) {
  const auto codes = to_utf32(text);
  const auto size = static_cast<int64_t>(codes.size());
  const int64_t at = index < 0 ? index + size : index;
  if (at < 0 || at >= size) return Value::undefined(cat("the string has no character ", index));
  return to_utf8(std::u32string_view(codes).substr(static_cast<size_t>(at), 1));
}

}  // namespace

void check_string_bytes(int64_t bytes) {
  if (bytes > kMaxStringBytes)
    throw TemplateError(cat("a string would be longer than ", kMaxStringBytes, " bytes"));
}

void check_list_items(int64_t items) {
  if (items > kMaxListItems)
    throw TemplateError(cat("a list would have more than ", kMaxListItems, " items"));
}

void append_bounded(std::string& out, std::string_view text) {
  check_string_bytes(static_cast<int64_t>(out.size() + text.size()));
  out += text;
}

ArgReader::ArgReader(std::string_view function, const Arguments& arguments)
    : function_(function), arguments_(arguments), named_used_(arguments.named.size(), false) {}

const Value* ArgReader::find(std::string_view name) {
  if (position_ < arguments_.positional.size()) return &arguments_.positional[position_++];
  for (size_t i = 0; i < arguments_.named.size(); ++i) {
    if (arguments_.named[i].first != name || named_used_[i]) continue;
    named_used_[i] = true;
    return &arguments_.named[i].second;
  }
  return nullptr;
}

bool ArgReader::has(std::string_view name) const {
  if (position_ < arguments_.positional.size()) return true;
  const auto& named = arguments_.named;
  return std::any_of(named.begin(), named.end(),
                     [&](const auto& pair) { return pair.first == name; });
}

Value ArgReader::next(std::string_view name, Value fallback) {
  const Value* found = find(name);
  return found != nullptr ? *found : std::move(fallback);
}

Value ArgReader::require(std::string_view name) {
  const Value* found = find(name);
  if (found == nullptr) throw TemplateError(cat(function_, ": argument '", name, "' is missing"));
  return *found;
}

int64_t ArgReader::next_int(std::string_view name, int64_t fallback) {
  const Value value = next(name, fallback);
  if (!value.is_integral()) {
    throw TemplateError(
        cat(function_, ": argument '", name, "' must be an integer, got ", value.type_name()));
  }
  return value.integer();
}

bool ArgReader::next_bool(std::string_view name, bool fallback) {
  return next(name, fallback).truthy();
}

std::string ArgReader::next_string(std::string_view name, std::string fallback) {
  const Value value = next(name, Value(std::move(fallback)));
  if (!value.is_string()) {
    throw TemplateError(
        cat(function_, ": argument '", name, "' must be a string, got ", value.type_name()));
  }
  return value.string();
}

std::string ArgReader::require_string(std::string_view name) {
  if (!has(name)) throw TemplateError(cat(function_, ": argument '", name, "' is missing"));
  return next_string(name, "");
}

std::vector<Value> ArgReader::rest() {
  const auto begin = arguments_.positional.begin() + static_cast<std::ptrdiff_t>(position_);
  position_ = arguments_.positional.size();
  return {begin, arguments_.positional.end()};
}

std::vector<std::pair<std::string, Value>> ArgReader::rest_named() {
  std::vector<std::pair<std::string, Value>> out;
  for (size_t i = 0; i < arguments_.named.size(); ++i) {
    if (!named_used_[i]) out.push_back(arguments_.named[i]);
    named_used_[i] = true;
  }
  return out;
}

void ArgReader::finish() const {
  if (position_ < arguments_.positional.size())
    throw TemplateError(cat(function_, ": too many arguments"));
  for (size_t i = 0; i < named_used_.size(); ++i) {
    if (!named_used_[i]) {
      throw TemplateError(cat(function_, ": unknown argument '", arguments_.named[i].first, "'"));
    }
  }
}

Value get_attribute(const Value& value, const std::string& name) {
  if (value.is_undefined()) throw TemplateError(value.undefined_hint());
  if (value.is_object()) return value.object()->attribute(name);
  if (has_method(value, name)) return Value(std::make_shared<BoundMethod>(value, name));
  if (const Value* found = value.find(name)) return *found;
  return Value::undefined(cat("'", value.type_name(), "' has no attribute '", name, "'"));
}

Value get_item(const Value& value, const Value& key) {
  if (value.is_undefined()) throw TemplateError(value.undefined_hint());
  if (const Value* found = value.find_key(key)) return *found;
  if (key.is_integral() && is_plain_sequence(value)) return index_sequence(value, key.integer());
  if (key.is_integral() && value.is_string()) return index_string(value.string(), key.integer());
  if (key.is_string()) return get_attribute(value, key.string());
  return Value::undefined(cat("'", value.type_name(), "' has no item ", repr(key)));
}

Value get_slice(const Value& value, const Value& start, const Value& stop, const Value& step) {
  if (value.is_undefined()) throw TemplateError(value.undefined_hint());
  const auto walk = [&](int64_t length, auto&& take) {
    const SliceBounds bounds = slice_bounds(start, stop, step, length);
    for (int64_t i = bounds.start; bounds.step > 0 ? i < bounds.stop : i > bounds.stop;) {
      take(static_cast<size_t>(i));
      if (__builtin_add_overflow(i, bounds.step, &i)) break;
    }
  };
  if (value.is_string()) {
    const auto codes = to_utf32(value.string());
    std::string out;
    walk(static_cast<int64_t>(codes.size()), [&](size_t i) { append_utf8(out, codes[i]); });
    return out;
  }
  if (is_plain_sequence(value)) {
    Value::List out;
    walk(static_cast<int64_t>(value.items().size()),
         [&](size_t i) { out.push_back(value.items()[i]); });
    return Value::sequence(std::move(out), value.sequence().kind);
  }
  throw TemplateError(cat("'", value.type_name(), "' cannot be sliced"));
}

Value get_path(const Value& value, const Value& path) {
  if (!path.is_string()) return get_item(value, path);
  Value at = value;
  std::string_view rest = path.string();
  while (true) {
    const size_t dot = rest.find('.');
    const std::string part(rest.substr(0, dot));
    const bool is_index =
        !part.empty() && part.size() < 10 &&
        std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
    at = is_index ? get_item(at, std::atoi(part.c_str())) : get_item(at, Value(part));
    if (dot == std::string_view::npos) return at;
    rest.remove_prefix(dot + 1);
  }
}

Value arithmetic(const std::string& op, const Value& a, const Value& b) {
  if (a.is_undefined()) throw TemplateError(a.undefined_hint());
  if (a.is_string() && op == "%") return percent_format(a.string(), b);
  if (b.is_undefined()) throw TemplateError(b.undefined_hint());
  if (a.is_integral() && b.is_integral()) return integer_arithmetic(op, a.integer(), b.integer());
  if (a.is_number() && b.is_number()) return float_arithmetic(op, a.number(), b.number());
  if (op == "*" && b.is_integral() && (a.is_string() || is_plain_sequence(a)))
    return repeat(a, b.integer());
  if (op == "*" && a.is_integral() && (b.is_string() || is_plain_sequence(b)))
    return repeat(b, a.integer());
  if (op == "+" && a.is_string() && b.is_string()) {
    std::string out = a.string();
    append_bounded(out, b.string());
    return out;
  }
  if (op == "+" && is_plain_sequence(a) && is_plain_sequence(b) &&
      a.sequence().kind == b.sequence().kind) {
    check_list_items(static_cast<int64_t>(a.items().size() + b.items().size()));
    Value::List out = a.items();
    out.insert(out.end(), b.items().begin(), b.items().end());
    return Value::sequence(std::move(out), a.sequence().kind);
  }
  throw TemplateError(
      cat("'", op, "' does not work on '", a.type_name(), "' and '", b.type_name(), "'"));
}

Value negate(const Value& value) {
  if (value.is_undefined()) throw TemplateError(value.undefined_hint());
  if (value.is_integral()) return integer_arithmetic("-", 0, value.integer());
  if (value.is_float()) return -value.number();
  throw TemplateError(cat("'-' does not work on '", value.type_name(), "'"));
}

bool contains(const Value& container, const Value& item) {
  if (container.is_undefined()) return false;
  if (container.is_mapping()) return container.find_key(item) != nullptr;
  if (container.is_sequence()) {
    const auto& items = container.items();
    return std::any_of(items.begin(), items.end(),
                       [&](const Value& other) { return equal(other, item); });
  }
  if (container.is_string() && item.is_string()) {
    return container.string().find(item.string()) != std::string::npos;
  }
  throw TemplateError(
      cat("'in' does not work on '", item.type_name(), "' and '", container.type_name(), "'"));
}

bool compare(const std::string& op, const Value& a, const Value& b) {
  if (op == "==") return equal(a, b);
  if (op == "!=") return !equal(a, b);
  if (op == "in") return contains(b, a);
  if (op == "not in") return !contains(b, a);
  if (a.is_undefined()) throw TemplateError(a.undefined_hint());
  if (b.is_undefined()) throw TemplateError(b.undefined_hint());
  if (op == "<") return less(a, b);
  if (op == ">") return less(b, a);
  if (op == "<=") return less(a, b) || equal(a, b);
  return less(b, a) || equal(a, b);
}

double round_decimal(double value, int64_t digits) {
  if (!std::isfinite(value) || digits > 300) return value;
  if (digits < 0) {
    const double scale = std::pow(10.0, static_cast<double>(-digits));
    return std::nearbyint(value / scale) * scale;
  }
  char buffer[700];  // printf rounds the exact binary value, ties to even, as Python does
  std::snprintf(buffer, sizeof(buffer), "%.*f", static_cast<int>(digits), value);
  return std::strtod(buffer, nullptr);
}

int64_t length_of(const Value& value) {
  if (value.is_undefined()) return 0;
  if (value.is_string()) return static_cast<int64_t>(count_code_points(value.string()));
  if (value.is_mapping()) return static_cast<int64_t>(value.pairs().size());
  if (value.is_sequence() && !value.is_sequence(SequenceKind::kGenerator)) {
    return static_cast<int64_t>(value.items().size());
  }
  throw TemplateError(cat("'", value.type_name(), "' has no length"));
}

}  // namespace fsdp::text::jinja
