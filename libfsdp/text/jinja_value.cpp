#include "libfsdp/text/jinja_value.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "libfsdp/io/json.h"
#include "libfsdp/text/jinja_unicode.h"

namespace fsdp::text::jinja {
namespace {

constexpr int kMaxNesting = 200;  // recursion over a value never goes deeper than this
constexpr int64_t kMaxNodes = 10'000'000;

}  // namespace

Value Value::undefined(std::string hint) {
  Value value;
  value.data_ = Undefined{std::make_shared<const std::string>(std::move(hint))};
  return value;
}

Value Value::none() {
  Value value;
  value.data_ = None{};
  return value;
}

Value::Extent Value::extent() const {
  if (is_sequence()) return sequence().extent;
  if (is_mapping()) return std::get<MappingPointer>(data_)->extent;
  return {.depth = 0, .nodes = 1};
}

void Value::Extent::include(const Value& item) {
  const Extent inner = item.extent();
  depth = std::max(depth, inner.depth + 1);
  nodes += inner.nodes;
}

void Value::Extent::check() const {
  if (depth > kMaxNesting) throw TemplateError("a list or dict is nested too deeply");
  if (nodes > kMaxNodes) throw TemplateError("a list or dict is too large");
}

Value Value::sequence(List items, SequenceKind kind) {
  Extent extent;
  for (const auto& item : items) extent.include(item);
  extent.check();
  Value value;
  value.data_ = std::make_shared<Sequence>(Sequence{std::move(items), kind, extent});
  return value;
}

Value Value::mapping(Dict pairs) {
  Dict unique;
  unique.reserve(pairs.size());
  Extent extent;
  for (auto& [key, item] : pairs) {
    extent.include(key);
    extent.include(item);
    const auto same = [&key = key](const Pair& pair) { return equal(pair.first, key); };
    const auto found = std::find_if(unique.begin(), unique.end(), same);
    if (found == unique.end()) {
      unique.emplace_back(std::move(key), std::move(item));
    } else {
      found->second = std::move(item);
    }
  }
  extent.check();
  Value value;
  value.data_ = std::make_shared<const Mapping>(Mapping{std::move(unique), extent});
  return value;
}

Value Value::from_json(const io::Json& json) {
  switch (json.kind()) {
    case io::Json::Kind::kNull:
      return none();
    case io::Json::Kind::kBool:
      return json.as_bool();
    case io::Json::Kind::kInt:
      return json.as_int();
    case io::Json::Kind::kDouble:
      return json.as_double();
    case io::Json::Kind::kString:
      return json.as_string();
    case io::Json::Kind::kArray: {
      List items;
      for (const auto& item : json.elements()) items.push_back(from_json(item));
      return sequence(std::move(items));
    }
    case io::Json::Kind::kObject: {
      Dict pairs;
      for (const auto& [key, item] : json.items()) pairs.emplace_back(key, from_json(item));
      return mapping(std::move(pairs));
    }
  }
  return {};
}

Value Value::from_json(std::string_view text) {
  try {
    return from_json(io::Json::parse(text, "JSON"));
  } catch (const io::JsonError& error) {
    throw TemplateError(error.what());
  }
}

std::string Value::undefined_hint() const {
  const auto& hint = std::get<Undefined>(data_).hint;
  return hint ? *hint : "the value is undefined";
}

const Value* Value::find_key(const Value& key) const {
  if (!is_mapping()) return nullptr;
  for (const auto& pair : pairs()) {
    if (equal(pair.first, key)) return &pair.second;
  }
  return nullptr;
}

const Value* Value::find(std::string_view key) const {
  if (!is_mapping()) return nullptr;
  for (const auto& pair : pairs()) {
    if (pair.first.is_string() && pair.first.string() == key) return &pair.second;
  }
  return nullptr;
}

Value::List Value::iterate() const {
  if (is_undefined()) return {};
  if (is_sequence(SequenceKind::kGenerator))
    return std::exchange(std::get<SequencePointer>(data_)->items, {});
  if (is_sequence()) return items();
  List out;
  if (is_string()) {
    for (size_t at = 0; at < string().size();) {
      const size_t begin = at;
      next_code_point(string(), at);
      out.emplace_back(string().substr(begin, at - begin));
    }
    return out;
  }
  if (is_mapping()) {
    for (const auto& pair : pairs()) out.push_back(pair.first);
    return out;
  }
  throw TemplateError(cat("'", type_name(), "' cannot be iterated"));
}

bool Value::truthy() const {
  if (is_undefined() || is_none()) return false;
  if (is_float()) return number() != 0.0;
  if (is_integral()) return integer() != 0;
  if (is_string()) return !string().empty();
  if (is_sequence(SequenceKind::kGenerator)) return true;
  if (is_sequence()) return !items().empty();
  if (is_mapping()) return !pairs().empty();
  return true;
}

std::string_view Value::type_name() const {
  if (is_undefined()) return "undefined";
  if (is_none()) return "None";
  if (is_bool()) return "bool";
  if (is_int()) return "int";
  if (is_float()) return "float";
  if (is_string()) return "str";
  if (is_mapping()) return "dict";
  if (is_object()) return "object";
  constexpr std::string_view kNames[] = {"list",      "tuple",       "generator",
                                         "dict_keys", "dict_values", "dict_items"};
  return kNames[static_cast<size_t>(sequence().kind)];
}

Value Object::attribute(const std::string& name) const {
  return Value::undefined(cat(repr(), " has no attribute '", name, "'"));
}

Value Object::call(const Arguments&) { throw TemplateError(cat(repr(), " cannot be called")); }

bool equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) {
    if (a.is_float() || b.is_float()) return a.number() == b.number();
    return a.integer() == b.integer();
  }
  if (a.is_string() && b.is_string()) return a.string() == b.string();
  if (a.is_undefined()) return b.is_undefined();
  if (a.is_none()) return b.is_none();
  if (a.is_object() && b.is_object()) return a.object() == b.object();
  if (a.is_sequence() && b.is_sequence()) {
    if (a.sequence().kind != b.sequence().kind) return false;
    if (a.is_sequence(SequenceKind::kGenerator)) return &a.sequence() == &b.sequence();
    return std::equal(a.items().begin(), a.items().end(), b.items().begin(), b.items().end(),
                      equal);
  }
  if (a.is_mapping() && b.is_mapping()) {
    if (a.pairs().size() != b.pairs().size()) return false;
    return std::all_of(a.pairs().begin(), a.pairs().end(), [&](const Value::Pair& pair) {
      const Value* other = b.find_key(pair.first);
      return other != nullptr && equal(pair.second, *other);
    });
  }
  return false;
}

bool less(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) {
    if (a.is_float() || b.is_float()) return a.number() < b.number();
    return a.integer() < b.integer();
  }
  // The order of UTF-8 bytes is the order of code points.
  if (a.is_string() && b.is_string()) return a.string() < b.string();
  if (a.is_sequence() && b.is_sequence() && a.sequence().kind == b.sequence().kind) {
    const size_t common = std::min(a.items().size(), b.items().size());
    for (size_t i = 0; i < common; ++i) {
      if (!equal(a.items()[i], b.items()[i])) return less(a.items()[i], b.items()[i]);
    }
    return a.items().size() < b.items().size();
  }
  throw TemplateError(cat("'", a.type_name(), "' and '", b.type_name(), "' have no order"));
}

}  // namespace fsdp::text::jinja
