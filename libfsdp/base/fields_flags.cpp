// Reading options from the command line.
#include <algorithm>

#include "libfsdp/base/error.h"
#include "libfsdp/base/fields.h"
#include "libfsdp/base/fields_impl.h"

namespace fsdp {
namespace {

bool is_boolean(const Field& field) { return std::holds_alternative<bool*>(field.target); }

bool looks_boolean(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  for (const auto* known : {"true", "false", "1", "0", "yes", "no", "on", "off"}) {
    if (text == known) return true;
  }
  return false;
}

bool is_flag(std::string_view text) { return text.size() > 2 && text.starts_with("--"); }

/// Walks over the arguments; one instance a command line.
class FlagReader {
 public:
  FlagReader(const FieldList& fields, std::span<const std::string> arguments,
             std::string_view program)
      : fields_(fields), arguments_(arguments), program_(program) {}

  std::vector<Assignment> read() {
    while (at_ < arguments_.size()) read_one();
    return std::move(assignments_);
  }

 private:
  void read_one() {
    const auto& argument = arguments_[at_++];
    if (!is_flag(argument)) refuse_positional(argument);
    const auto equals = argument.find('=');
    const auto name = argument.substr(2, equals == std::string::npos ? equals : equals - 2);
    const auto* field = find_field(fields_, name);
    if (field == nullptr && equals == std::string::npos) {
      if (const auto* negated = find_negated(name)) return add(*negated, "false");
    }
    if (field == nullptr)
      throw ConfigError(detail::unknown_option(fields_, name, "command line", program_));
    if (equals != std::string::npos) return add(*field, argument.substr(equals + 1));
    if (!field->refusal.empty()) return add(*field, "");  // whatever follows, it is refused
    if (is_boolean(*field)) return add(*field, next_is_boolean() ? arguments_[at_++] : "true");
    if (at_ == arguments_.size() || is_flag(arguments_[at_])) {
      throw ConfigError(
          cat("[options] --", field->name, " (command line) needs a value, and none follows it."));
    }
    add(*field, arguments_[at_++]);
  }

  const Field* find_negated(const std::string& name) const {
    if (!name.starts_with("no_") && !name.starts_with("no-")) return nullptr;
    const auto* field = find_field(fields_, std::string_view(name).substr(3));
    return field != nullptr && is_boolean(*field) ? field : nullptr;
  }

  bool next_is_boolean() const { return at_ < arguments_.size() && looks_boolean(arguments_[at_]); }

  void add(const Field& field, const std::string& value) {
    for (const auto& earlier : assignments_) {
      if (earlier.name == field.name && earlier.values.front() != value) {
        throw ConfigError(cat("[options] --", field.name, " (command line) is given twice, as '",
                              earlier.values.front(), "' and as '", value, "'."));
      }
    }
    assignments_.push_back({field.name, {value}, false, false, "command line"});
  }

  [[noreturn]] void refuse_positional(const std::string& argument) const {
    const auto* hint = argument.ends_with(".yaml") || argument.ends_with(".yml")
                           ? " Hint: a configuration file is given with --config."
                           : " Hint: options start with two dashes.";
    throw ConfigError(cat("[options] unexpected argument '", argument, "' of '", program_,
                          "' (command line).", hint));
  }

  const FieldList& fields_;
  std::span<const std::string> arguments_;
  std::string_view program_;
  size_t at_ = 0;
  std::vector<Assignment> assignments_;
};

}  // namespace

namespace detail {

std::string unknown_option(const FieldList& fields, std::string_view name, std::string_view origin,
                           std::string_view program) {
  std::vector<std::string> known;
  for (const auto& field : fields) {
    if (!field.refusal.empty()) continue;
    known.push_back(field.name);
    known.insert(known.end(), field.rules.aliases.begin(), field.rules.aliases.end());
  }
  std::string wanted(name);
  std::replace(wanted.begin(), wanted.end(), '-', '_');
  const auto nearest = nearest_name(known, wanted);
  return cat("[options] --", wanted, " (", origin, ") is not an option of '", program, "'.",
             nearest.empty() ? " Hint: " + std::string(program) + " --help lists them."
                             : " Did you mean --" + nearest + "?");
}

}  // namespace detail

std::vector<Assignment> read_flags(const FieldList& fields, std::span<const std::string> arguments,
                                   std::string_view program) {
  return FlagReader(fields, arguments, program).read();
}

}  // namespace fsdp
