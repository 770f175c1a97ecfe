// Options are aggregates with defaults and one `fields` list each; that list feeds the command
// line, --help, yaml, JSON and docs/configuration.md, so that no option is named twice.
//
//   struct EvalOptions {
//     int64_t batch = 8;
//     template <class V> void fields(V& v) {
//       v.group("Evaluation");
//       v("batch", batch, "Sequences a rank evaluates at once.", {.aliases = {"eval_batch"}, .min =
//       1});
//     }
//   };
//   EvalOptions options;
//   Origins origins = load_options(fields_of(options), arguments, "finetune eval");
//
// An enum is a field when `names_of(E)` (found by its namespace) lists its values and their names.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace fsdp {

/// What is legal for a field, beside its type.
struct FieldRules {
  std::vector<std::string> aliases;  ///< Other names that mean the same.
  std::vector<std::string> choices;  ///< Legal values of a text; empty = any.
  std::optional<double> min;         ///< Smallest legal number.
  std::optional<double> max;         ///< Largest legal number.
  bool above_min = false;            ///< `min` itself is illegal.
};

/// An enum behind a field: its value and its names by position.
struct EnumTarget {
  std::vector<std::string> names;
  std::function<size_t()> get;
  std::function<void(size_t)> set;
};

using FieldTarget = std::variant<bool*, int64_t*, double*, std::string*, std::filesystem::path*,
                                 std::vector<std::string>*, std::optional<int64_t>*,
                                 std::optional<double>*, EnumTarget>;

/// One option: its name, where its value lives, and what is legal. The options struct must outlive
/// it.
struct Field {
  std::string name;
  std::string group;
  std::string help;
  FieldRules rules;
  FieldTarget target;
  std::string refusal;  ///< Not empty: a name that is known and cannot be honoured, and why.
};

using FieldList = std::vector<Field>;

/// The visitor that turns an options struct into a FieldList.
class FieldCollector {
 public:
  /// Names the heading of the fields that follow.
  void group(std::string_view title) { group_ = title; }

  template <class T>
  void operator()(std::string_view name, T& value, std::string_view help, FieldRules rules = {}) {
    list_.push_back(
        {std::string(name), group_, std::string(help), std::move(rules), target_of(value), {}});
  }

  /// Names of other tools that are known here and cannot be honoured: giving one is an error that
  /// says why.
  void refused(std::initializer_list<std::string_view> names, std::string_view why) {
    for (const auto name : names) {
      list_.push_back(
          {std::string(name), "", "", {}, static_cast<std::string*>(nullptr), std::string(why)});
    }
  }

  FieldList take() { return std::move(list_); }

 private:
  template <class T>
  static FieldTarget target_of(T& value) {
    if constexpr (std::is_enum_v<T>) {
      EnumTarget target;
      for (const auto& [ignored, name] : names_of(T{})) target.names.emplace_back(name);
      target.get = [&value] {
        size_t i = 0;
        for (const auto& [known, ignored] : names_of(T{})) {
          if (known == value) return i;
          ++i;
        }
        return i;
      };
      target.set = [&value](size_t i) { value = names_of(T{})[i].first; };
      return target;
    } else {
      return &value;
    }
  }

  std::string group_;
  FieldList list_;
};

/// The fields of an options struct, in the order of its list; they point into `options`.
template <class Options>
FieldList fields_of(Options& options) {
  FieldCollector collector;
  options.fields(collector);
  return collector.take();
}

/// Where each field that was given came from ("command line", "run.yaml:12"); absent = its default.
class Origins {
 public:
  void set(const std::string& name, std::string origin) { by_name_[name] = std::move(origin); }
  bool given(const std::string& name) const { return by_name_.count(name) != 0; }
  /// "--name (run.yaml:12)", or "--name (default)".
  std::string describe(const std::string& name) const;

 private:
  std::map<std::string, std::string> by_name_;
};

/// One value that somebody gave: from the command line one text, from yaml perhaps a list.
struct Assignment {
  std::string name;                 ///< Canonical name of the field.
  std::vector<std::string> values;  ///< One element, unless `is_list`.
  bool is_list = false;
  bool is_null = false;
  std::string origin;
};

/// Sets the field from text; throws ConfigError (origin, name, what was got, what is expected).
void assign(const Field& field, const Assignment& assignment);

/// The field's present value as people write it; "" for an empty text, "none" for an empty
/// optional.
std::string value_text(const Field& field);

/// The field called `name` (`-` counts as `_`, aliases count), or nullptr.
const Field* find_field(const FieldList& fields, std::string_view name);

/// The known name nearest to `name` by edit distance; "" when none is near. `known` and aliases are
/// compared.
std::string nearest_name(std::span<const std::string> known, std::string_view name);

/// Reads `--x v`, `--x=v`, `--x`, `--x false`, `--no_x`. Throws ConfigError for what it does not
/// know; `program` names the command in the text ("finetune train").
std::vector<Assignment> read_flags(const FieldList& fields, std::span<const std::string> arguments,
                                   std::string_view program);

/// Reads a flat yaml map of the same names. Refuses unknown and repeated keys, nesting, anchors and
/// aliases, several documents and files above 1 MiB, naming file:line. Throws ConfigError.
std::vector<Assignment> read_yaml(const FieldList& fields, const std::filesystem::path& path,
                                  std::string_view program);

/// Defaults < yaml (the field "config", when there is one and it is given) < flags.
Origins load_options(const FieldList& fields, std::span<const std::string> arguments,
                     std::string_view program);

/// The text of --help: grouped, aligned, wrapped to `columns`; the values shown are the present
/// ones.
std::string help_text(const FieldList& fields, size_t columns = 100);

/// Markdown tables of the fields, one a group.
std::string help_markdown(const FieldList& fields);

/// The present values as one JSON object, indented by two spaces; numbers read back to the same
/// value.
std::string fields_json(const FieldList& fields);

}  // namespace fsdp
