// JSON values for configuration documents: strict on reading, order and number spelling kept on
// writing.
#pragma once

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "libfsdp/base/error.h"

namespace fsdp::io {

/// A document that is not JSON, or not the JSON that was asked for.
class JsonError : public ModelError {
 public:
  using ModelError::ModelError;
};

/// Bounds of a parsed document: nothing nests deeper, nothing holds more values.
struct JsonLimits {
  int max_depth = 64;
  int64_t max_values = 16'000'000;
};

struct JsonMember;

/// One JSON value. A plain value type: copies are deep; const use from several threads is safe.
///
/// Integers are exact (int64); a number that was read keeps its spelling for `dump` (1e-05 stays
/// 1e-05, and a 31-digit integer keeps its digits although only `as_double` can read it).
class Json {
 public:
  enum class Kind : uint8_t { kNull, kBool, kInt, kDouble, kString, kArray, kObject };
  using Array = std::vector<Json>;
  using Object = std::vector<JsonMember>;

  Json() = default;
  Json(std::nullptr_t) {}  // NOLINT: implicit on purpose
  template <std::same_as<bool> B>
  Json(B value) : value_(value) {}  // NOLINT
  template <std::signed_integral I>
  Json(I value) : value_(static_cast<int64_t>(value)) {}  // NOLINT
  template <std::unsigned_integral U>
  requires(!std::same_as<U, bool>) Json(U value) { set_unsigned(value); }  // NOLINT
  template <std::floating_point F>
  Json(F value) : value_(Double{static_cast<double>(value), {}}) {}  // NOLINT
  Json(const char* value) : value_(std::string(value)) {}            // NOLINT
  Json(std::string_view value) : value_(std::string(value)) {}       // NOLINT
  Json(std::string value) : value_(std::move(value)) {}              // NOLINT
  template <class T>
  Json(const std::vector<T>& values) : value_(Array(values.begin(), values.end())) {}  // NOLINT

  /// An object of these members; their keys must differ. For large objects: `[]` looks through all
  /// members.
  Json(Object members);  // NOLINT

  /// Empty or filled containers: `Json::object({{"a", 1}, {"b", Json::array({1, 2})}})`.
  static Json array(std::initializer_list<Json> values = {});
  static Json object(std::initializer_list<std::pair<std::string, Json>> members = {});

  /// Reads one document. `where` (a path, or path:line) starts every message.
  /// Throws: JsonError for bad syntax or UTF-8, a NUL byte, a repeated key, or more than `limits`.
  static Json parse(std::string_view text, std::string_view where, JsonLimits limits = {});

  /// parse() of a whole file. Throws: ModelError when it cannot be read.
  static Json read(const std::string& path, JsonLimits limits = {});

  /// The document as text, UTF-8 unescaped; `indent` < 0 gives one line without spaces. Doubles are
  /// written with the shortest digits that read back to the same number. Throws: InternalError for
  /// NaN and infinity.
  std::string dump(int indent = -1) const;

  Kind kind() const;
  bool is_null() const { return kind() == Kind::kNull; }
  bool is_bool() const { return kind() == Kind::kBool; }
  bool is_int() const { return kind() == Kind::kInt; }
  bool is_number() const { return is_int() || kind() == Kind::kDouble; }
  bool is_string() const { return kind() == Kind::kString; }
  bool is_array() const { return kind() == Kind::kArray; }
  bool is_object() const { return kind() == Kind::kObject; }

  /// The value as that type; throws JsonError "expected an integer, got "abc"". No conversion but
  /// int -> double.
  bool as_bool() const;
  int64_t as_int() const;
  double as_double() const;
  const std::string& as_string() const&;
  std::string as_string() && { return as_string(); }

  /// as_*() chosen by type: bool, any signed or unsigned integer (range checked), float, double,
  /// std::string, Json, or a std::vector of these.
  template <class T>
  T as() const;

  /// Members of an object in order, elements of an array in order; throws JsonError for any other
  /// kind.
  const Object& items() const&;
  const Array& elements() const&;
  const Object& items() && = delete;  // `for (... : f().items())` would walk over freed memory.
  const Array& elements() && = delete;

  /// Members or elements; 0 for anything else.
  size_t size() const;
  bool empty() const { return size() == 0; }

  /// Element i; throws JsonError outside the array. (Templates, or the literal 0 would also be a
  /// null key.)
  template <std::integral I>
  const Json& operator[](I i) const& {
    return element(static_cast<size_t>(i));
  }
  template <std::integral I>
  Json& operator[](I i) & {
    return const_cast<Json&>(element(static_cast<size_t>(i)));
  }
  template <std::integral I>
  Json operator[](I i) && {
    return element(static_cast<size_t>(i));
  }

  /// Member of an object, nullptr when there is none or this is no object. Cost: linear in the
  /// members.
  const Json* find(std::string_view key) const&;
  const Json* find(std::string_view key) && = delete;
  bool contains(std::string_view key) const { return find(key) != nullptr; }

  /// Member `key`; throws JsonError when it is missing.
  const Json& operator[](std::string_view key) const&;
  const Json& operator[](const char* key) const& { return (*this)[std::string_view(key)]; }
  Json operator[](std::string_view key) && { return std::as_const(*this)[key]; }
  Json operator[](const char* key) && { return std::as_const(*this)[std::string_view(key)]; }

  /// Member `key` for writing, added as null when missing; null becomes an object.
  Json& operator[](std::string_view key) &;
  Json& operator[](const char* key) & { return (*this)[std::string_view(key)]; }

  /// Member `key` as T; the message of a wrong type names the key.
  template <class T>
  T get(std::string_view key) const {
    return at_key<T>((*this)[key], key);
  }

  /// Member `key` as T, `fallback` when it is missing or null.
  template <class T>
  T get(std::string_view key, T fallback) const {
    const Json* value = find(key);
    return value == nullptr || value->is_null() ? std::move(fallback) : at_key<T>(*value, key);
  }
  std::string get(std::string_view key, const char* fallback) const {
    return get<std::string>(key, std::string(fallback));
  }

  /// Appends to an array; null becomes an array.
  void push_back(Json value);

  /// Takes a member away; nothing happens when there is none.
  void erase(std::string_view key);

  /// Same values in the same order; numbers compare by value.
  bool operator==(const Json& other) const;

 private:
  friend class JsonBuilder;
  struct Double {
    double value;
    std::string spelling;  // Empty: written by value.
  };
  void set_unsigned(uint64_t value);
  const Json& element(size_t i) const;
  [[noreturn]] void wrong_kind(std::string_view expected) const;
  void dump_to(std::string& out, int indent, int depth) const;
  template <class T>
  static T at_key(const Json& value, std::string_view key);
  static void check_range(bool fits, int64_t value);

  std::variant<std::monostate, bool, int64_t, Double, std::string, Array, Object> value_;
};

struct JsonMember {
  std::string key;
  Json value;
};

namespace detail {
template <class T>
struct IsVector : std::false_type {};
template <class T>
struct IsVector<std::vector<T>> : std::true_type {};
}  // namespace detail

template <class T>
T Json::as() const {
  if constexpr (std::same_as<T, bool>) {
    return as_bool();
  } else if constexpr (std::integral<T>) {
    const int64_t value = as_int();
    check_range(std::in_range<T>(value), value);
    return static_cast<T>(value);
  } else if constexpr (std::floating_point<T>) {
    return static_cast<T>(as_double());
  } else if constexpr (std::same_as<T, std::string>) {
    return as_string();
  } else if constexpr (std::same_as<T, Json>) {
    return *this;
  } else {
    static_assert(detail::IsVector<T>::value, "Json::as: no such type");
    T values;
    for (const Json& element : elements()) values.push_back(element.as<typename T::value_type>());
    return values;
  }
}

template <class T>
T Json::at_key(const Json& value, std::string_view key) {
  try {
    return value.as<T>();
  } catch (const JsonError& error) {
    throw JsonError(cat("'", key, "': ", error.what()));
  }
}

/// `text` as a JSON string, with quotes and escapes.
std::string json_quote(std::string_view text);

}  // namespace fsdp::io
