// Values of chat templates: what Python objects are to Jinja2.
//
// Values are immutable and cheap to copy (containers are shared), except namespaces and other
// Objects, which have identity. Not thread-safe while a generator inside is being consumed; JSON
// data holds none.
#pragma once

#include <concepts>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "libfsdp/base/error.h"

namespace fsdp::io {
class Json;
}

namespace fsdp::text::jinja {

/// A template that cannot be parsed or rendered; the text names template and line.
class TemplateError : public ModelError {
 public:
  explicit TemplateError(const std::string& text, bool raised_by_template = false)
      : ModelError(text), raised_by_template_(raised_by_template) {}
  /// True when the template itself called raise_exception, which usually means that the data does
  /// not suit it.
  bool raised_by_template() const { return raised_by_template_; }

 private:
  bool raised_by_template_;
};

class Object;

/// What Python would call the sequence; it decides printing, truth and what may be done with it.
enum class SequenceKind : uint8_t { kList, kTuple, kGenerator, kKeys, kValues, kItems };

class Value {
 public:
  using List = std::vector<Value>;
  using Pair = std::pair<Value, Value>;
  using Dict = std::vector<Pair>;  ///< in order of insertion; keys are unique

  struct Undefined {
    std::shared_ptr<const std::string> hint;  ///< what was not found
  };
  struct None {};
  /// How large a container is with everything in it; bounded, so that walking a value always ends
  /// soon.
  struct Extent {
    int depth = 1;
    int64_t nodes = 1;
    void include(const Value& item);
    void check() const;
  };
  struct Sequence {
    List items;
    SequenceKind kind;
    Extent extent;
  };
  struct Mapping {
    Dict pairs;
    Extent extent;
  };

  Value() = default;  ///< undefined
  template <std::same_as<bool> B>
  Value(B value) : data_(value) {}
  template <std::integral I>
  requires(!std::same_as<I, bool> && !std::same_as<I, char>) Value(I value)
      : data_(static_cast<int64_t>(value)) {}
  Value(double value) : data_(value) {}
  Value(std::string value) : data_(std::make_shared<const std::string>(std::move(value))) {}
  Value(std::string_view value) : Value(std::string(value)) {}
  Value(const char* value) : Value(std::string(value)) {}
  Value(std::shared_ptr<Object> object) : data_(std::move(object)) {}

  static Value undefined(std::string hint);
  static Value none();
  /// Throws TemplateError when nested too deeply or too large.
  static Value sequence(List items, SequenceKind kind = SequenceKind::kList);
  /// Later pairs win over earlier ones with an equal key, in the place of the earlier one.
  static Value mapping(Dict pairs);
  /// Parses JSON, keeping the order of keys. Throws TemplateError on broken JSON.
  static Value from_json(std::string_view text);
  static Value from_json(const io::Json& json);

  bool is_undefined() const { return std::holds_alternative<Undefined>(data_); }
  bool is_none() const { return std::holds_alternative<None>(data_); }
  bool is_bool() const { return std::holds_alternative<bool>(data_); }
  bool is_int() const { return std::holds_alternative<int64_t>(data_); }
  bool is_float() const { return std::holds_alternative<double>(data_); }
  bool is_number() const { return is_bool() || is_int() || is_float(); }
  bool is_integral() const { return is_bool() || is_int(); }
  bool is_string() const { return std::holds_alternative<StringPointer>(data_); }
  bool is_sequence() const { return std::holds_alternative<SequencePointer>(data_); }
  bool is_sequence(SequenceKind kind) const { return is_sequence() && sequence().kind == kind; }
  bool is_mapping() const { return std::holds_alternative<MappingPointer>(data_); }
  bool is_object() const { return std::holds_alternative<std::shared_ptr<Object>>(data_); }

  /// Unchecked accessors: the caller has asked the matching is_...() first.
  const std::string& string() const { return *std::get<StringPointer>(data_); }
  const Sequence& sequence() const { return *std::get<SequencePointer>(data_); }
  const List& items() const { return sequence().items; }
  const Dict& pairs() const { return std::get<MappingPointer>(data_)->pairs; }
  const std::shared_ptr<Object>& object() const { return std::get<std::shared_ptr<Object>>(data_); }
  int64_t integer() const { return is_bool() ? std::get<bool>(data_) : std::get<int64_t>(data_); }
  double number() const {
    return is_float() ? std::get<double>(data_) : static_cast<double>(integer());
  }
  std::string undefined_hint() const;

  /// Value under `key`, or nullptr. Cost: linear in the number of keys.
  const Value* find_key(const Value& key) const;
  const Value* find(std::string_view key) const;

  /// Items that a loop sees: elements, keys, or characters; undefined is empty. A generator is
  /// emptied. Throws TemplateError for what cannot be iterated.
  List iterate() const;

  bool truthy() const;
  /// Name for messages: "str", "list", "None", ...
  std::string_view type_name() const;

 private:
  using StringPointer = std::shared_ptr<const std::string>;
  using SequencePointer = std::shared_ptr<Sequence>;
  using MappingPointer = std::shared_ptr<const Mapping>;
  Extent extent() const;

  std::variant<Undefined, None, bool, int64_t, double, StringPointer, SequencePointer,
               MappingPointer, std::shared_ptr<Object>>
      data_;
};

struct Arguments {
  Value::List positional;
  std::vector<std::pair<std::string, Value>> named;
};

/// Something with identity: a namespace, macro, method, the `loop` variable.
class Object {
 public:
  virtual ~Object() = default;
  /// Attribute `name`; undefined when there is none.
  virtual Value attribute(const std::string& name) const;
  virtual bool callable() const { return false; }
  virtual Value call(const Arguments& arguments);
  virtual std::string repr() const = 0;
};

/// Python's str(): what `{{ value }}` prints.
std::string to_text(const Value& value);
/// Python's repr().
std::string repr(const Value& value);

/// Python's == and <; less throws TemplateError for kinds that have no order.
bool equal(const Value& a, const Value& b);
bool less(const Value& a, const Value& b);

struct JsonStyle {
  bool indented = false;
  std::string indent;
  std::string item_separator = ", ";
  std::string key_separator = ": ";
  bool ensure_ascii = false;
  bool sort_keys = false;
};
/// Python's json.dumps. Throws TemplateError for what JSON cannot hold.
std::string to_json(const Value& value, const JsonStyle& style = {});

/// Python's repr of a float: the shortest digits that read back to the same number.
std::string float_text(double value);

}  // namespace fsdp::text::jinja
