// Tests (`x is ...`) and the global functions of templates.
#include <ctime>
#include <unordered_map>

#include "libfsdp/text/jinja_interpreter.h"
#include "libfsdp/text/jinja_runtime.h"
#include "libfsdp/text/jinja_unicode.h"

namespace fsdp::text::jinja {
namespace {

using I = Interpreter&;
using V = const Value&;
using A = const Arguments&;

Value one_argument(std::string_view test, A arguments) {
  ArgReader args(test, arguments);
  const Value value = args.require("other");
  args.finish();
  return value;
}

int64_t integer_subject(std::string_view test, V subject) {
  if (!subject.is_integral())
    throw TemplateError(cat(test, ": expected an integer, got '", subject.type_name(), "'"));
  return subject.integer();
}

bool test_divisible(I, V subject, A arguments) {
  const Value by = one_argument("divisibleby", arguments);
  return arithmetic("%", integer_subject("divisibleby", subject), by).integer() == 0;
}

bool test_same(I, V subject, A arguments) {
  const Value other = one_argument("sameas", arguments);
  const bool constants =
      (subject.is_none() && other.is_none()) || (subject.is_bool() && other.is_bool());
  return constants ? equal(subject, other) : subject.is_object() && equal(subject, other);
}

bool test_sequence(I, V subject, A) {
  return subject.is_undefined() || subject.is_string() || subject.is_mapping() ||
         (subject.is_sequence() && !subject.is_sequence(SequenceKind::kGenerator));
}

bool test_iterable(I, V subject, A) {
  return subject.is_undefined() || subject.is_string() || subject.is_mapping() ||
         subject.is_sequence();
}

bool test_upper(I, V subject, A) {
  return call_method(Value(to_text(subject)), "isupper", {}).truthy();
}
bool test_lower(I, V subject, A) {
  return call_method(Value(to_text(subject)), "islower", {}).truthy();
}

template <char kOp>
bool test_order(I, V subject, A arguments) {
  const Value other = one_argument("comparison", arguments);
  constexpr std::string_view kName = kOp == 'l' ? "<" : kOp == 'L' ? "<=" : kOp == 'g' ? ">" : ">=";
  return compare(std::string(kName), subject, other);
}

bool test_equal(I, V subject, A arguments) {
  return equal(subject, one_argument("equalto", arguments));
}
bool test_unequal(I, V subject, A arguments) {
  return !equal(subject, one_argument("ne", arguments));
}
bool test_in(I, V subject, A arguments) { return contains(one_argument("in", arguments), subject); }
bool test_odd(I, V subject, A) { return integer_subject("odd", subject) % 2 != 0; }
bool test_even(I, V subject, A) { return integer_subject("even", subject) % 2 == 0; }

Value global_range(I interpreter, A arguments) {
  ArgReader args("range", arguments);
  const int64_t first = integer_subject("range", args.require("start"));
  const bool two = args.has("stop");
  const int64_t start = two ? first : 0;
  const int64_t stop = two ? args.next_int("stop", 0) : first;
  const int64_t step = args.next_int("step", 1);
  args.finish();
  if (step == 0) throw TemplateError("range: the step must not be zero");
  Value::List out;
  constexpr size_t kMaxRange = 100'000;  // the limit of Jinja2's sandbox
  for (int64_t i = start; step > 0 ? i < stop : i > stop;) {
    if (out.size() >= kMaxRange) throw TemplateError(cat("range: more than ", kMaxRange, " items"));
    out.emplace_back(i);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  interpreter.charge(static_cast<int64_t>(out.size()));
  return Value::sequence(std::move(out));
}

/// Pairs of dict(...) and namespace(...): a dict or a list of pairs, then named ones.
Value::Dict pairs_of(std::string_view function, A arguments) {
  if (arguments.positional.size() > 1) throw TemplateError(cat(function, ": too many arguments"));
  Value::Dict pairs;
  if (!arguments.positional.empty()) {
    const Value& from = arguments.positional[0];
    if (from.is_mapping()) {
      pairs = from.pairs();
    } else {
      for (const Value& pair : from.iterate()) {
        const Value::List both = pair.iterate();
        if (both.size() != 2) throw TemplateError(cat(function, ": expected pairs"));
        pairs.emplace_back(both[0], both[1]);
      }
    }
  }
  for (const auto& [name, value] : arguments.named) pairs.emplace_back(name, value);
  return pairs;
}

Value global_dict(I, A arguments) { return Value::mapping(pairs_of("dict", arguments)); }

Value global_namespace(I interpreter, A arguments) {
  std::vector<std::pair<std::string, Value>> values;
  for (auto& [name, value] : pairs_of("namespace", arguments))
    values.emplace_back(to_text(name), std::move(value));
  return interpreter.make_namespace(std::move(values));
}

Value global_raise(I, A arguments) {
  ArgReader args("raise_exception", arguments);
  const std::string message = to_text(args.require("message"));
  args.finish();
  throw TemplateError(message, true);
}

Value global_strftime(I interpreter, A arguments) {
  ArgReader args("strftime_now", arguments);
  const std::string format = args.require_string("format");
  args.finish();
  std::tm now{};
  if (interpreter.options().now) {
    now = *interpreter.options().now;
  } else {
    const std::time_t seconds = std::time(nullptr);
    localtime_r(&seconds, &now);
  }
  char buffer[512];
  // The format comes from the template: strftime is bounded by the buffer and gives 0 when it does
  // not fit.
  const size_t size = std::strftime(buffer, sizeof(buffer), format.c_str(), &now);
  if (size == 0 && !format.empty()) throw TemplateError("strftime_now: the result is too long");
  return std::string(buffer, size);
}

}  // namespace

TestFunction find_test(const std::string& name) {
  static const std::unordered_map<std::string, TestFunction> kTests = {
      {"boolean", [](I, V v, A) { return v.is_bool(); }},
      {"callable", [](I, V v, A) { return v.is_object() && v.object()->callable(); }},
      {"defined", [](I, V v, A) { return !v.is_undefined(); }},
      {"divisibleby", test_divisible},
      {"even", test_even},
      {"false", [](I, V v, A) { return v.is_bool() && !v.truthy(); }},
      {"filter", [](I, V v, A) { return find_filter(to_text(v)) != nullptr; }},
      {"float", [](I, V v, A) { return v.is_float(); }},
      {"in", test_in},
      {"integer", [](I, V v, A) { return v.is_int(); }},
      {"iterable", test_iterable},
      {"lower", test_lower},
      {"mapping", [](I, V v, A) { return v.is_mapping(); }},
      {"none", [](I, V v, A) { return v.is_none(); }},
      {"number", [](I, V v, A) { return v.is_number(); }},
      {"odd", test_odd},
      {"sameas", test_same},
      {"sequence", test_sequence},
      {"string", [](I, V v, A) { return v.is_string(); }},
      {"test", [](I, V v, A) { return find_test(to_text(v)) != nullptr; }},
      {"true", [](I, V v, A) { return v.is_bool() && v.truthy(); }},
      {"undefined", [](I, V v, A) { return v.is_undefined(); }},
      {"upper", test_upper},
      {"==", test_equal},
      {"eq", test_equal},
      {"equalto", test_equal},
      {"!=", test_unequal},
      {"ne", test_unequal},
      {"<", test_order<'l'>},
      {"lt", test_order<'l'>},
      {"lessthan", test_order<'l'>},
      {"<=", test_order<'L'>},
      {"le", test_order<'L'>},
      {">", test_order<'g'>},
      {"gt", test_order<'g'>},
      {"greaterthan", test_order<'g'>},
      {">=", test_order<'G'>},
      {"ge", test_order<'G'>},
  };
  const auto found = kTests.find(name);
  return found == kTests.end() ? nullptr : found->second;
}

GlobalFunction find_global(const std::string& name) {
  static const std::unordered_map<std::string, GlobalFunction> kGlobals = {
      {"dict", global_dict},   {"namespace", global_namespace},   {"raise_exception", global_raise},
      {"range", global_range}, {"strftime_now", global_strftime},
  };
  const auto found = kGlobals.find(name);
  return found == kGlobals.end() ? nullptr : found->second;
}

}  // namespace fsdp::text::jinja
