// Filters of templates. Each takes the arguments of its Jinja2 namesake, in the same order and with
// the same names.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <unordered_map>

#include "libfsdp/text/jinja_interpreter.h"
#include "libfsdp/text/jinja_runtime.h"
#include "libfsdp/text/jinja_unicode.h"

namespace fsdp::text::jinja {
namespace {

using I = Interpreter&;
using V = const Value&;
using A = const Arguments&;

Value method(V subject, const std::string& name, A arguments) {
  return call_method(Value(to_text(subject)), name, arguments);
}

/// Case folded when the filter ignores case, as its `case_sensitive` argument says.
Value fold_case(V value, bool case_sensitive) {
  return !case_sensitive && value.is_string() ? Value(lower(value.string())) : value;
}

Value attribute_or_self(V value, V attribute) {
  return attribute.is_none() ? value : get_path(value, attribute);
}

Value generator(Value::List items) {
  return Value::sequence(std::move(items), SequenceKind::kGenerator);
}

Value filter_trim(I, V subject, A arguments) { return method(subject, "strip", arguments); }
Value filter_upper(I, V subject, A) { return upper(to_text(subject)); }
Value filter_lower(I, V subject, A) { return lower(to_text(subject)); }
Value filter_capitalize(I, V subject, A arguments) {
  return method(subject, "capitalize", arguments);
}
Value filter_string(I, V subject, A) { return to_text(subject); }
Value filter_safe(I, V subject, A) { return to_text(subject); }
Value filter_length(I, V subject, A) { return length_of(subject); }
Value filter_list(I, V subject, A) { return Value::sequence(subject.iterate()); }

/// The first letter of every word is upper case; words begin after white space, '-' and opening
/// brackets.
Value filter_title(I, V subject, A) {
  const std::string text = to_text(subject);
  std::string out;
  bool begins_word = true;
  for (size_t at = 0; at < text.size();) {
    const char32_t code = next_code_point(text, at);
    append_utf8(out, begins_word ? to_upper(code) : to_lower(code));
    begins_word =
        is_space(code) || code == '-' || code == '(' || code == '{' || code == '[' || code == '<';
  }
  return out;
}

Value filter_escape(I, V subject, A) {
  std::string out;
  for (const char c : to_text(subject)) {
    const std::string_view replacement = c == '&'    ? "&amp;"
                                         : c == '<'  ? "&lt;"
                                         : c == '>'  ? "&gt;"
                                         : c == '\'' ? "&#39;"
                                         : c == '"'  ? "&#34;"
                                                     : std::string_view(&c, 1);
    append_bounded(out, replacement);
  }
  return out;
}

Value filter_replace(I, V subject, A arguments) {
  ArgReader args("replace", arguments);
  Arguments texts;
  texts.positional.emplace_back(to_text(args.require("old")));
  texts.positional.emplace_back(to_text(args.require("new")));
  const Value count = args.next("count", Value::none());
  texts.positional.push_back(count.is_none() ? Value(-1) : count);
  args.finish();
  return method(subject, "replace", texts);
}

Value filter_indent(I, V subject, A arguments) {
  ArgReader args("indent", arguments);
  const Value width = args.next("width", 4);
  const bool first = args.next_bool("first", false);
  const bool blank = args.next_bool("blank", false);
  args.finish();
  if (!width.is_string() && !width.is_integral())
    throw TemplateError("indent: the width must be a number or a string");
  if (width.is_integral()) check_string_bytes(width.integer());
  const std::string margin =
      width.is_string()
          ? width.string()
          : std::string(static_cast<size_t>(std::max<int64_t>(0, width.integer())), ' ');
  const Value lines = call_method(Value(to_text(subject) + "\n"), "splitlines", {});
  std::string out;
  for (size_t i = 0; i < lines.items().size(); ++i) {
    const std::string& line = lines.items()[i].string();
    if (i > 0) out += '\n';
    if (i == 0 ? first : blank || !line.empty()) append_bounded(out, margin);
    append_bounded(out, line);
  }
  return out;
}

Value filter_tojson(I, V subject, A arguments) {
  ArgReader args("tojson", arguments);
  JsonStyle style;
  style.ensure_ascii = args.next_bool("ensure_ascii", false);
  const Value indent = args.next("indent", Value::none());
  const Value separators = args.next("separators", Value::none());
  style.sort_keys = args.next_bool("sort_keys", false);
  args.finish();
  style.indented = !indent.is_none();
  if (style.indented) {
    style.item_separator.assign(1, ',');  // g++ 12 warns falsely about = ","
    const int64_t width = indent.is_integral() ? std::clamp<int64_t>(indent.integer(), 0, 1000) : 0;
    style.indent =
        indent.is_string() ? indent.string() : std::string(static_cast<size_t>(width), ' ');
  }
  if (!separators.is_none()) {
    const Value::List pair = separators.iterate();
    if (pair.size() != 2) throw TemplateError("tojson: separators must be two strings");
    style.item_separator = to_text(pair[0]);
    style.key_separator = to_text(pair[1]);
  }
  return to_json(subject, style);
}

Value filter_default(I, V subject, A arguments) {
  ArgReader args("default", arguments);
  const Value fallback = args.next("default_value", "");
  const bool boolean = args.next_bool("boolean", false);
  args.finish();
  return subject.is_undefined() || (boolean && !subject.truthy()) ? fallback : subject;
}

Value filter_items(I, V subject, A) {
  if (subject.is_undefined()) return generator({});
  if (!subject.is_mapping())
    throw TemplateError(cat("items: expected a dict, got '", subject.type_name(), "'"));
  return generator(call_method(subject, "items", {}).items());
}

Value filter_join(I, V subject, A arguments) {
  ArgReader args("join", arguments);
  const std::string separator = to_text(args.next("d", ""));
  const Value attribute = args.next("attribute", Value::none());
  args.finish();
  std::string out;
  bool first = true;
  for (const Value& item : subject.iterate()) {
    if (!std::exchange(first, false)) append_bounded(out, separator);
    append_bounded(out, to_text(attribute_or_self(item, attribute)));
  }
  return out;
}

Value filter_first(I, V subject, A) {
  const Value::List items = subject.iterate();
  return items.empty() ? Value::undefined("No first item, sequence was empty.") : items.front();
}

Value filter_last(I, V subject, A) {
  if (subject.is_sequence(SequenceKind::kGenerator))
    throw TemplateError("last: a generator has no last item");
  const Value::List items = subject.iterate();
  return items.empty() ? Value::undefined("No last item, sequence was empty.") : items.back();
}

Value filter_reverse(I, V subject, A) {
  if (subject.is_string()) {
    auto codes = to_utf32(subject.string());
    std::reverse(codes.begin(), codes.end());
    return to_utf8(codes);
  }
  Value::List items = subject.iterate();
  std::reverse(items.begin(), items.end());
  return generator(std::move(items));
}

/// map(attribute=..., default=...) or map("filter", arguments of the filter...).
Value filter_map(I interpreter, V subject, A arguments) {
  ArgReader args("map", arguments);
  Value::List out;
  if (arguments.positional.empty()) {
    Arguments named = arguments;
    ArgReader reader("map", named);
    const Value attribute = reader.require("attribute");
    const Value fallback = reader.next("default", Value());
    reader.finish();
    for (const Value& item : subject.iterate()) {
      Value value = get_path(item, attribute);
      out.push_back(value.is_undefined() && !fallback.is_undefined() ? fallback : std::move(value));
    }
    return generator(std::move(out));
  }
  const std::string name = args.require_string("filter");
  Arguments rest{args.rest(), args.rest_named()};
  for (const Value& item : subject.iterate()) {
    interpreter.charge(1);
    out.push_back(interpreter.apply_filter(name, item, rest));
  }
  return generator(std::move(out));
}

/// select, reject, selectattr, rejectattr: what stays, by a test ("is it true?" when none is
/// named).
Value select_items(I interpreter, V subject, A arguments, bool keep, bool by_attribute) {
  ArgReader args("select", arguments);
  const Value attribute = by_attribute ? args.require("attribute") : Value::none();
  const std::string test = args.next_string("test", "");
  const Arguments rest{args.rest(), args.rest_named()};
  Value::List out;
  for (const Value& item : subject.iterate()) {
    interpreter.charge(1);
    const Value value = attribute_or_self(item, attribute);
    if ((test.empty() ? value.truthy() : interpreter.apply_test(test, value, rest)) == keep)
      out.push_back(item);
  }
  return generator(std::move(out));
}

Value filter_select(I i, V s, A a) { return select_items(i, s, a, true, false); }
Value filter_reject(I i, V s, A a) { return select_items(i, s, a, false, false); }
Value filter_selectattr(I i, V s, A a) { return select_items(i, s, a, true, true); }
Value filter_rejectattr(I i, V s, A a) { return select_items(i, s, a, false, true); }

/// Stable sort by key. Errors of the comparison come out as they are.
void sort_by(I interpreter, std::vector<std::pair<Value, Value>>& keyed, bool reverse) {
  interpreter.charge(static_cast<int64_t>(keyed.size()) * 8);
  // Python's reversed sort keeps the order of equals too.
  std::stable_sort(keyed.begin(), keyed.end(), [reverse](const auto& a, const auto& b) {
    return reverse ? less(b.first, a.first) : less(a.first, b.first);
  });
}

Value filter_sort(I interpreter, V subject, A arguments) {
  ArgReader args("sort", arguments);
  const bool reverse = args.next_bool("reverse", false);
  const bool case_sensitive = args.next_bool("case_sensitive", false);
  const Value attribute = args.next("attribute", Value::none());
  args.finish();
  std::vector<std::pair<Value, Value>> keyed;
  for (const Value& item : subject.iterate()) {
    keyed.emplace_back(fold_case(attribute_or_self(item, attribute), case_sensitive), item);
  }
  sort_by(interpreter, keyed, reverse);
  Value::List out;
  for (auto& [key, item] : keyed) out.push_back(std::move(item));
  return Value::sequence(std::move(out));
}

Value filter_dictsort(I interpreter, V subject, A arguments) {
  ArgReader args("dictsort", arguments);
  const bool case_sensitive = args.next_bool("case_sensitive", false);
  const std::string by = args.next_string("by", "key");
  const bool reverse = args.next_bool("reverse", false);
  args.finish();
  if (!subject.is_mapping())
    throw TemplateError(cat("dictsort: expected a dict, got '", subject.type_name(), "'"));
  if (by != "key" && by != "value") throw TemplateError("dictsort: 'by' must be 'key' or 'value'");
  std::vector<std::pair<Value, Value>> keyed;
  for (const auto& [key, item] : subject.pairs()) {
    keyed.emplace_back(fold_case(by == "key" ? key : item, case_sensitive),
                       Value::sequence({key, item}, SequenceKind::kTuple));
  }
  sort_by(interpreter, keyed, reverse);
  Value::List out;
  for (auto& [key, pair] : keyed) out.push_back(std::move(pair));
  return Value::sequence(std::move(out));
}

Value filter_unique(I interpreter, V subject, A arguments) {
  ArgReader args("unique", arguments);
  const bool case_sensitive = args.next_bool("case_sensitive", false);
  const Value attribute = args.next("attribute", Value::none());
  args.finish();
  Value::List seen, out;
  for (const Value& item : subject.iterate()) {
    const Value key = fold_case(attribute_or_self(item, attribute), case_sensitive);
    interpreter.charge(static_cast<int64_t>(seen.size()) + 1);
    if (std::any_of(seen.begin(), seen.end(), [&](V other) { return equal(other, key); })) continue;
    seen.push_back(key);
    out.push_back(item);
  }
  return generator(std::move(out));
}

Value extreme(V subject, A arguments, bool largest) {
  ArgReader args(largest ? "max" : "min", arguments);
  const bool case_sensitive = args.next_bool("case_sensitive", false);
  const Value attribute = args.next("attribute", Value::none());
  args.finish();
  const Value::List items = subject.iterate();
  if (items.empty()) return Value::undefined("No aggregated item, sequence was empty.");
  const auto key = [&](V item) {
    return fold_case(attribute_or_self(item, attribute), case_sensitive);
  };
  const Value* best = &items.front();
  for (const Value& item : items) {
    if (largest ? less(key(*best), key(item)) : less(key(item), key(*best))) best = &item;
  }
  return *best;
}

Value filter_min(I, V s, A a) { return extreme(s, a, false); }
Value filter_max(I, V s, A a) { return extreme(s, a, true); }

Value filter_sum(I, V subject, A arguments) {
  ArgReader args("sum", arguments);
  const Value attribute = args.next("attribute", Value::none());
  Value total = args.next("start", 0);
  args.finish();
  for (const Value& item : subject.iterate())
    total = arithmetic("+", total, attribute_or_self(item, attribute));
  return total;
}

Value filter_abs(I, V subject, A) {
  if (subject.is_undefined()) throw TemplateError(subject.undefined_hint());
  if (!subject.is_number())
    throw TemplateError(cat("abs: expected a number, got '", subject.type_name(), "'"));
  return subject.number() < 0 ? negate(subject) : subject;
}

Value filter_round(I, V subject, A arguments) {
  ArgReader args("round", arguments);
  const int64_t precision = args.next_int("precision", 0);
  const std::string way = args.next_string("method", "common");
  args.finish();
  if (!subject.is_number())
    throw TemplateError(cat("round: expected a number, got '", subject.type_name(), "'"));
  if (way == "common") {
    if (subject.is_float()) return round_decimal(subject.number(), precision);
    return precision >= 0 ? Value(subject.integer())
                          : Value(static_cast<int64_t>(round_decimal(subject.number(), precision)));
  }
  if (way != "ceil" && way != "floor")
    throw TemplateError("round: the method must be common, ceil or floor");
  const double scale = std::pow(10.0, static_cast<double>(precision));
  const double scaled = subject.number() * scale;
  return (way == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / scale;
}

/// A number written in a string, or undefined.
Value parse_number(std::string_view text, int64_t base, bool whole) {
  std::string digits(strip(text, true, true));
  std::erase(digits, '_');
  const char* begin = digits.c_str() + (digits.starts_with('+') ? 1 : 0);
  const char* end = digits.c_str() + digits.size();
  int64_t integer = 0;
  if (whole) {
    const auto result = std::from_chars(begin, end, integer, static_cast<int>(base));
    return result.ec == std::errc() && result.ptr == end && begin != end ? Value(integer) : Value();
  }
  double number = 0;
  const auto result = std::from_chars(begin, end, number);
  return result.ec == std::errc() && result.ptr == end && begin != end ? Value(number) : Value();
}

Value truncate_to_int(double number, V fallback) {
  return std::isfinite(number) && std::fabs(number) < 9.2e18 ? Value(static_cast<int64_t>(number))
                                                             : fallback;
}

Value filter_int(I, V subject, A arguments) {
  ArgReader args("int", arguments);
  const Value fallback = args.next("default", 0);
  const int64_t base = args.next_int("base", 10);
  args.finish();
  if (subject.is_undefined()) throw TemplateError(subject.undefined_hint());
  if (base < 2 || base > 36) throw TemplateError("int: the base must be from 2 to 36");
  if (subject.is_integral()) return subject.integer();
  if (subject.is_float()) return truncate_to_int(subject.number(), fallback);
  if (!subject.is_string()) return fallback;
  std::string_view text = strip(subject.string(), true, true);
  if (base == 16 && (text.starts_with("0x") || text.starts_with("0X"))) text.remove_prefix(2);
  const Value whole = parse_number(text, base, true);
  if (!whole.is_undefined()) return whole;
  const Value real = parse_number(text, 10, false);
  return real.is_undefined() ? fallback : truncate_to_int(real.number(), fallback);
}

Value filter_float(I, V subject, A arguments) {
  ArgReader args("float", arguments);
  const Value fallback = args.next("default", 0.0);
  args.finish();
  if (subject.is_undefined()) throw TemplateError(subject.undefined_hint());
  if (subject.is_number()) return subject.number();
  if (!subject.is_string()) return fallback;
  const Value number = parse_number(subject.string(), 10, false);
  return number.is_undefined() ? fallback : number;
}

Value filter_format(I, V subject, A arguments) {
  if (!arguments.named.empty()) throw TemplateError("format: named arguments are not supported");
  return percent_format(to_text(subject),
                        Value::sequence(arguments.positional, SequenceKind::kTuple));
}

Value filter_attr(I, V subject, A arguments) {
  ArgReader args("attr", arguments);
  const std::string name = args.require_string("name");
  args.finish();
  if (subject.is_mapping() && !has_method(subject, name))
    return Value::undefined(cat("no attribute '", name, "'"));
  return get_attribute(subject, name);
}

Value filter_batch(I, V subject, A arguments) {
  ArgReader args("batch", arguments);
  const int64_t count = args.next_int("linecount", 0);
  const Value fill = args.next("fill_with", Value::none());
  args.finish();
  if (count < 1) throw TemplateError("batch: the number of items in a batch must be positive");
  check_list_items(count);
  Value::List out, row;
  for (const Value& item : subject.iterate()) {
    if (static_cast<int64_t>(row.size()) == count)
      out.push_back(Value::sequence(std::exchange(row, {})));
    row.push_back(item);
  }
  if (!row.empty() && !fill.is_none()) row.resize(static_cast<size_t>(count), fill);
  if (!row.empty()) out.push_back(Value::sequence(std::move(row)));
  return generator(std::move(out));
}

Value filter_wordcount(I, V subject, A) {
  return static_cast<int64_t>(call_method(Value(to_text(subject)), "split", {}).items().size());
}

}  // namespace

FilterFunction find_filter(const std::string& name) {
  static const std::unordered_map<std::string, FilterFunction> kFilters = {
      {"abs", filter_abs},
      {"attr", filter_attr},
      {"batch", filter_batch},
      {"capitalize", filter_capitalize},
      {"count", filter_length},
      {"d", filter_default},
      {"default", filter_default},
      {"dictsort", filter_dictsort},
      {"e", filter_escape},
      {"escape", filter_escape},
      {"first", filter_first},
      {"float", filter_float},
      {"format", filter_format},
      {"indent", filter_indent},
      {"int", filter_int},
      {"items", filter_items},
      {"join", filter_join},
      {"last", filter_last},
      {"length", filter_length},
      {"list", filter_list},
      {"lower", filter_lower},
      {"map", filter_map},
      {"max", filter_max},
      {"min", filter_min},
      {"reject", filter_reject},
      {"rejectattr", filter_rejectattr},
      {"replace", filter_replace},
      {"reverse", filter_reverse},
      {"round", filter_round},
      {"safe", filter_safe},
      {"select", filter_select},
      {"selectattr", filter_selectattr},
      {"sort", filter_sort},
      {"string", filter_string},
      {"sum", filter_sum},
      {"title", filter_title},
      {"tojson", filter_tojson},
      {"trim", filter_trim},
      {"unique", filter_unique},
      {"upper", filter_upper},
      {"wordcount", filter_wordcount},
  };
  const auto found = kFilters.find(name);
  return found == kFilters.end() ? nullptr : found->second;
}

}  // namespace fsdp::text::jinja
