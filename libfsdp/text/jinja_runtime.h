// What expressions of a template do to values: operators, lookups, methods, and the reading of call
// arguments.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/text/jinja_value.h"

namespace fsdp::text::jinja {

/// No string that a template builds may be longer.
constexpr int64_t kMaxStringBytes = int64_t{64} << 20;
/// No range() or list that a template builds by operators may be longer.
constexpr int64_t kMaxListItems = 1'000'000;

/// Throws TemplateError when a string of `bytes` would be too long.
void check_string_bytes(int64_t bytes);
/// Throws TemplateError when a list of `items` would be too long.
void check_list_items(int64_t items);
/// out += text, bounded.
void append_bounded(std::string& out, std::string_view text);

/// Reads the arguments of one call in order of its parameters, each given by position or by name.
/// Throws TemplateError naming the function for missing, surplus and mistyped arguments.
class ArgReader {
 public:
  ArgReader(std::string_view function, const Arguments& arguments);
  bool has(std::string_view name) const;  ///< is the next parameter given?
  Value next(std::string_view name, Value fallback);
  Value require(std::string_view name);
  int64_t next_int(std::string_view name, int64_t fallback);
  bool next_bool(std::string_view name, bool fallback);
  std::string next_string(std::string_view name, std::string fallback);
  std::string require_string(std::string_view name);
  /// The positional arguments that are left.
  std::vector<Value> rest();
  /// Named arguments that are left.
  std::vector<std::pair<std::string, Value>> rest_named();
  void finish() const;

 private:
  const Value* find(std::string_view name);

  std::string_view function_;
  const Arguments& arguments_;
  size_t position_ = 0;
  std::vector<bool> named_used_;
};

/// value.name: attributes and methods first, then the key. Undefined when there is none; throws on
/// undefined values.
Value get_attribute(const Value& value, const std::string& name);
/// value[key]: the item or key first, then the attribute.
Value get_item(const Value& value, const Value& key);
/// value[start:stop:step]; absent bounds are None.
Value get_slice(const Value& value, const Value& start, const Value& stop, const Value& step);
/// "a.b.0" as the filters' `attribute=` arguments mean it; an integer is an index.
Value get_path(const Value& value, const Value& path);

/// a op b for + - * / // % **.
Value arithmetic(const std::string& op, const Value& a, const Value& b);
Value negate(const Value& value);
/// item in container.
bool contains(const Value& container, const Value& item);
/// op is one of == != < <= > >= in "not in".
bool compare(const std::string& op, const Value& a, const Value& b);

/// Calls a method of str or dict, e.g. call_method("a b", "split", {}). False in `has_method` for
/// unknown names.
bool has_method(const Value& self, std::string_view name);
Value call_method(const Value& self, const std::string& name, const Arguments& arguments);

/// Python's "..." % arguments for the conversions s r d i f e g x o c and %%.
std::string percent_format(std::string_view format, const Value& arguments);
/// Python's round(value, digits).
double round_decimal(double value, int64_t digits);
/// len(value); throws for what has no length.
int64_t length_of(const Value& value);

}  // namespace fsdp::text::jinja
