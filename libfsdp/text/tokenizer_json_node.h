// A checked view of a JSON document: every access names its path in errors, duplicate keys are
// refused. Internal: only tokenizer_json*.cpp include this.
#pragma once

#include <simdjson.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/base/error.h"

namespace fsdp::text {

class JsonNode {
 public:
  JsonNode(simdjson::dom::element value, std::string path)
      : value_(value), path_(std::move(path)) {}

  const std::string& path() const { return path_; }
  bool is_object() const { return value_.is_object(); }
  bool is_array() const { return value_.is_array(); }
  bool is_string() const { return value_.is_string(); }
  bool is_integer() const { return value_.is_int64(); }

  [[noreturn]] void fail(std::string_view what) const {
    throw ModelError(cat("[tokenizer] ", path_, ": ", what));
  }

  simdjson::dom::object object() const { return typed<simdjson::dom::object>("an object"); }
  simdjson::dom::array array() const { return typed<simdjson::dom::array>("an array"); }
  std::string_view string() const { return typed<std::string_view>("a string"); }
  bool boolean() const { return typed<bool>("true or false"); }

  int64_t integer(int64_t low, int64_t high) const {
    const auto value = typed<int64_t>("an integer");
    if (value < low || value > high)
      fail(cat("got ", value, ", expected ", low, " to ", high, "."));
    return value;
  }

  std::vector<JsonNode> items() const {
    std::vector<JsonNode> out;
    for (const auto item : array()) {
      out.emplace_back(item, cat(path_, "[", out.size(), "]"));
    }
    return out;
  }

  /// The member, or nothing when it is missing or null.
  std::optional<JsonNode> find(std::string_view key) const {
    std::optional<JsonNode> found;
    for (const auto field : object()) {
      if (field.key != key) continue;
      if (found) fail(cat("the key '", key, "' is there twice."));
      found.emplace(field.value, cat(path_, ".", key));
    }
    return found && found->value_.is_null() ? std::nullopt : found;
  }

  JsonNode at(std::string_view key) const {
    auto found = find(key);
    if (!found) fail(cat("'", key, "' is missing."));
    return *std::move(found);
  }

  bool boolean_or(std::string_view key, bool otherwise) const {
    const auto found = find(key);
    return found ? found->boolean() : otherwise;
  }

 private:
  template <class T>
  T typed(std::string_view expected) const {
    T value;
    if (value_.get(value) != simdjson::SUCCESS) fail(cat("expected ", expected, "."));
    return value;
  }

  simdjson::dom::element value_;
  std::string path_;
};

/// A parsed document; its nodes live as long as it does.
class JsonDocument {
 public:
  /// Throws ModelError when `json` is not one JSON document, or nests deeper than 64.
  JsonDocument(std::string_view json, std::string_view where) : where_(where) {
    constexpr size_t kMaxDepth = 64;
    auto error = parser_.allocate(std::max<size_t>(json.size(), 64), kMaxDepth);
    simdjson::dom::element root;
    if (!error) error = parser_.parse(json.data(), json.size(), true).get(root);
    if (error)
      throw ModelError(
          cat("[tokenizer] ", where, " is not valid JSON: ", simdjson::error_message(error)));
    root_ = root;
  }
  JsonNode root() const { return {root_, where_}; }

 private:
  std::string where_;
  simdjson::dom::parser parser_;
  simdjson::dom::element root_;
};

}  // namespace fsdp::text
