#include "libfsdp/base/fields.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>

#include "libfsdp/base/error.h"

namespace fsdp {
namespace {

std::string number_text(double value) {
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), value).ptr;
  return {buffer, end};
}

std::string join(const std::vector<std::string>& parts, std::string_view separator) {
  std::string text;
  for (const auto& part : parts) text += (text.empty() ? "" : std::string(separator)) + part;
  return text;
}

/// Reads one assignment into its target. One object an assignment, so that errors know the whole
/// story.
class Assigner {
 public:
  Assigner(const Field& field, const Assignment& assignment) : field_(field), given_(assignment) {}

  void operator()(bool* target) const { *target = boolean(); }
  void operator()(int64_t* target) const { *target = integer(); }
  void operator()(double* target) const { *target = real(); }
  void operator()(std::string* target) const {
    *target = given_.is_null ? std::string() : single("text");
    if (!field_.rules.choices.empty() && !given_.is_null)
      position_of(*target, field_.rules.choices);
  }
  void operator()(std::filesystem::path* target) const {
    *target = given_.is_null ? std::filesystem::path() : std::filesystem::path(single("a path"));
  }
  void operator()(std::vector<std::string>* target) const {
    target->clear();
    if (given_.is_list) *target = given_.values;
    if (!given_.is_list && !given_.is_null) split(given_.values.front(), *target);
    for (const auto& value : *target) {
      if (!field_.rules.choices.empty()) position_of(value, field_.rules.choices);
    }
  }
  void operator()(std::optional<int64_t>* target) const {
    *target = is_none() ? std::nullopt : std::optional(integer());
  }
  void operator()(std::optional<double>* target) const {
    *target = is_none() ? std::nullopt : std::optional(real());
  }
  void operator()(const EnumTarget& target) const {
    const auto text = single("text");
    target.set(position_of(text, target.names));
  }

 private:
  [[noreturn]] void refuse(const std::string& expected) const {
    const auto got =
        given_.is_null ? std::string("nothing") : "'" + join(given_.values, ", ") + "'";
    throw ConfigError(cat("[options] --", field_.name, " (", given_.origin, "): got ", got,
                          ", expected ", expected, "."));
  }

  bool is_none() const {
    return given_.is_null || (!given_.is_list && given_.values.front() == "none");
  }

  const std::string& single(const std::string& expected) const {
    if (given_.is_null || given_.is_list) refuse(expected);
    return given_.values.front();
  }

  bool boolean() const {
    auto text = single("true or false");
    std::transform(text.begin(), text.end(), text.begin(),
                   [](unsigned char c) { return std::tolower(c); });
    if (text == "true" || text == "1" || text == "yes" || text == "on") return true;
    if (text == "false" || text == "0" || text == "no" || text == "off") return false;
    refuse("true or false");
  }

  template <class T>
  T number(const std::string& expected) const {
    const auto& text = single(expected);
    T value{};
    const char* begin = text.data() + (text.size() > 1 && text[0] == '+' ? 1 : 0);
    const auto [end, problem] = std::from_chars(begin, text.data() + text.size(), value);
    if (problem == std::errc::result_out_of_range)
      refuse(expected + " that this machine can represent");
    if (problem != std::errc() || end != text.data() + text.size() ||
        !std::isfinite(static_cast<double>(value))) {
      refuse(expected);
    }
    check_range(static_cast<double>(value));
    return value;
  }
  int64_t integer() const { return number<int64_t>("an integer"); }
  double real() const { return number<double>("a number"); }

  void check_range(double value) const {
    const auto& rules = field_.rules;
    if (rules.min && (value < *rules.min || (rules.above_min && value == *rules.min))) {
      refuse((rules.above_min ? "a number above " : "at least ") + number_text(*rules.min));
    }
    if (rules.max && value > *rules.max) refuse("at most " + number_text(*rules.max));
  }

  size_t position_of(const std::string& text, const std::vector<std::string>& names) const {
    const auto found = std::find(names.begin(), names.end(), text);
    if (found != names.end()) return static_cast<size_t>(found - names.begin());
    const auto nearest = nearest_name(names, text);
    refuse("one of " + join(names, ", ") +
           (nearest.empty() ? "" : " (did you mean " + nearest + "?)"));
  }

  static void split(const std::string& text, std::vector<std::string>& parts) {
    for (size_t begin = 0; begin < text.size();) {
      const auto end = std::min(text.find(',', begin), text.size());
      if (end > begin) parts.push_back(text.substr(begin, end - begin));
      begin = end + 1;
    }
  }

  const Field& field_;
  const Assignment& given_;
};

struct ValueText {
  std::string operator()(const bool* value) const { return *value ? "true" : "false"; }
  std::string operator()(const int64_t* value) const { return std::to_string(*value); }
  std::string operator()(const double* value) const { return number_text(*value); }
  std::string operator()(const std::string* value) const { return *value; }
  std::string operator()(const std::filesystem::path* value) const { return value->string(); }
  std::string operator()(const std::vector<std::string>* value) const { return join(*value, ","); }
  std::string operator()(const std::optional<int64_t>* value) const {
    return *value ? std::to_string(**value) : "none";
  }
  std::string operator()(const std::optional<double>* value) const {
    return *value ? number_text(**value) : "none";
  }
  std::string operator()(const EnumTarget& value) const { return value.names.at(value.get()); }
};

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i + 1;
    for (size_t j = 0; j < b.size(); ++j) {
      const auto substituted = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({substituted, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

}  // namespace

std::string Origins::describe(const std::string& name) const {
  const auto found = by_name_.find(name);
  return cat("--", name, " (", found == by_name_.end() ? "default" : found->second, ")");
}

void assign(const Field& field, const Assignment& assignment) {
  if (!field.refusal.empty()) {
    throw ConfigError(cat("[options] --", field.name, " (", assignment.origin,
                          ") cannot be honoured: ", field.refusal, "."));
  }
  std::visit(Assigner(field, assignment), field.target);
}

std::string value_text(const Field& field) { return std::visit(ValueText{}, field.target); }

const Field* find_field(const FieldList& fields, std::string_view name) {
  std::string wanted(name);
  std::replace(wanted.begin(), wanted.end(), '-', '_');
  for (const auto& field : fields) {
    const auto& aliases = field.rules.aliases;
    if (field.name == wanted || std::find(aliases.begin(), aliases.end(), wanted) != aliases.end())
      return &field;
  }
  return nullptr;
}

std::string nearest_name(std::span<const std::string> known, std::string_view name) {
  std::string best;
  size_t best_distance = std::max<size_t>(2, name.size() / 3) + 1;  // farther than this is no hint
  for (const auto& candidate : known) {
    const auto distance = edit_distance(name, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

Origins load_options(const FieldList& fields, std::span<const std::string> arguments,
                     std::string_view program) {
  const auto flags = read_flags(fields, arguments, program);
  Origins origins;
  const auto apply = [&](const std::vector<Assignment>& assignments) {
    for (const auto& assignment : assignments) {
      assign(*find_field(fields, assignment.name), assignment);
      origins.set(assignment.name, assignment.origin);
    }
  };
  for (const auto& flag : flags) {
    if (flag.name == "config") apply(read_yaml(fields, flag.values.front(), program));
  }
  apply(flags);
  return origins;
}

}  // namespace fsdp
