// What people and programs read about the options: --help, markdown, JSON.
#include <algorithm>
#include <cstdio>

#include "libfsdp/base/error.h"
#include "libfsdp/base/fields.h"

namespace fsdp {
namespace {

struct TypeName {
  std::string operator()(const bool*) const { return "true|false"; }
  std::string operator()(const int64_t*) const { return "N"; }
  std::string operator()(const double*) const { return "X"; }
  std::string operator()(const std::string*) const { return "TEXT"; }
  std::string operator()(const std::filesystem::path*) const { return "PATH"; }
  std::string operator()(const std::vector<std::string>*) const { return "A,B,..."; }
  std::string operator()(const std::optional<int64_t>*) const { return "N"; }
  std::string operator()(const std::optional<double>*) const { return "X"; }
  std::string operator()(const EnumTarget&) const { return "TEXT"; }
};

std::vector<std::string> choices_of(const Field& field) {
  if (const auto* target = std::get_if<EnumTarget>(&field.target)) return target->names;
  return field.rules.choices;
}

std::string type_text(const Field& field) {
  std::string text;
  for (const auto& choice : choices_of(field)) text += (text.empty() ? "" : "|") + choice;
  return text.empty() ? std::visit(TypeName{}, field.target) : text;
}

std::string default_text(const Field& field) {
  const auto value = value_text(field);
  return value.empty() ? "none" : value;
}

/// The help sentence with what follows from the rules.
std::string full_help(const Field& field) {
  std::string text = field.help;
  if (!field.rules.aliases.empty()) {
    text += " Also:";
    for (const auto& alias : field.rules.aliases) text += " --" + alias;
    text += ".";
  }
  return text;
}

std::vector<std::string> wrap(const std::string& text, size_t width) {
  std::vector<std::string> lines(1);
  for (size_t begin = 0; begin < text.size();) {
    const auto end = std::min(text.find(' ', begin), text.size());
    const auto word = text.substr(begin, end - begin);
    if (!lines.back().empty() && lines.back().size() + 1 + word.size() > width)
      lines.emplace_back();
    lines.back() += (lines.back().empty() ? "" : " ") + word;
    begin = end + 1;
  }
  return lines;
}

std::string json_string(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += {'\\', c};
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\u%04x", static_cast<unsigned>(c));
      out += escape;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

struct JsonText {
  std::string operator()(const bool* value) const { return *value ? "true" : "false"; }
  std::string operator()(const int64_t* value) const { return std::to_string(*value); }
  std::string operator()(const double* value) const { return number(*value); }
  std::string operator()(const std::string* value) const {
    return value->empty() ? "null" : json_string(*value);
  }
  std::string operator()(const std::filesystem::path* value) const {
    return value->empty() ? "null" : json_string(value->string());
  }
  std::string operator()(const std::vector<std::string>* value) const {
    std::string text = "[";
    for (const auto& part : *value) text += (text.size() > 1 ? ", " : "") + json_string(part);
    return text + "]";
  }
  std::string operator()(const std::optional<int64_t>* value) const {
    return *value ? std::to_string(**value) : "null";
  }
  std::string operator()(const std::optional<double>* value) const {
    return *value ? number(**value) : "null";
  }
  std::string operator()(const EnumTarget& value) const {
    return json_string(value.names.at(value.get()));
  }

  static std::string number(double value) { return value_text({"", "", "", {}, &value, {}}); }
};

}  // namespace

std::string help_text(const FieldList& fields, size_t columns) {
  constexpr size_t kNameColumn = 36;
  std::string out;
  std::string group;
  for (const auto& field : fields) {
    if (!field.refusal.empty()) continue;
    if (field.group != group) {
      group = field.group;
      out += (out.empty() ? "" : "\n") + group + ":\n";
    }
    const bool is_switch = std::holds_alternative<bool*>(field.target);
    auto head = cat("  --", field.name, is_switch ? "" : " " + type_text(field));
    const auto help =
        wrap(cat(full_help(field), " [", default_text(field), "]"), columns - kNameColumn - 1);
    if (head.size() >= kNameColumn) {
      out += head + "\n";
      head.clear();
    }
    for (const auto& line : help) {
      out += head + std::string(kNameColumn - head.size(), ' ') + line + "\n";
      head.clear();
    }
  }
  return out;
}

std::string help_markdown(const FieldList& fields) {
  std::string out;
  std::string group;
  const auto cell = [](std::string text) {
    for (size_t at = 0; (at = text.find('|', at)) != std::string::npos; at += 2)
      text.insert(at, "\\");
    return text;
  };
  for (const auto& field : fields) {
    if (!field.refusal.empty()) continue;
    if (field.group != group) {
      group = field.group;
      out += cat("\n### ", group,
                 "\n\n| option | value | default | meaning |\n| --- | --- | --- | --- |\n");
    }
    out += cat("| `--", field.name, "` | ", cell(type_text(field)), " | ", default_text(field),
               " | ", cell(full_help(field)), " |\n");
  }
  return out;
}

std::string fields_json(const FieldList& fields) {
  std::string out = "{";
  for (const auto& field : fields) {
    if (!field.refusal.empty()) continue;
    out += cat(out.size() > 1 ? ",\n  " : "\n  ", json_string(field.name), ": ",
               std::visit(JsonText{}, field.target));
  }
  return out + "\n}\n";
}

}  // namespace fsdp
