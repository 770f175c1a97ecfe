#include "libfsdp/lora/config_fields.h"

#include <algorithm>
#include <set>
#include <vector>

#include "libfsdp/base/error.h"

namespace fsdp::lora {
namespace {

using io::Json;

std::string path_of(const std::string& directory) { return directory + "/adapter_config.json"; }

// A field that was left out, or says that nothing is done.
bool says_nothing(const Json& value) {
  if (value.is_null() || (value.is_bool() && !value.as_bool())) return true;
  return (value.is_array() || value.is_object()) && value.empty();
}

// Fields that change nothing here: notes, or settings of other programs.
bool is_note(const std::string& name) {
  static const std::set<std::string> notes = {
      "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
      "revision",     "runtime_config",          "task_type"};
  return notes.count(name) != 0;
}

std::string_view name_of(PeftType type) {
  for (const auto& [known, name] : names_of(PeftType{}))
    if (known == type) return name;
  throw InternalError("unknown kind of adapter");
}

PeftType type_of(const Json& document, const std::string& path) {
  const Json* type = document.find("peft_type");
  std::string all;
  for (const auto& [known, name] : names_of(PeftType{})) {
    if (type && type->is_string() && type->as_string() == name) return known;
    all += cat(all.empty() ? "" : ", ", name);
  }
  throw ModelError(cat(path, ": peft_type is ", type ? type->dump() : "missing",
                       ": only these kinds of adapters can be read: ", all));
}

}  // namespace

PeftType read_peft_type(const std::string& directory) {
  const std::string path = path_of(directory);
  return type_of(Json::read(path), path);
}

PeftNotes read_peft_fields(const std::string& directory, PeftType type, const ReadField& read) {
  const std::string path = path_of(directory);
  const Json document = Json::read(path);
  if (const PeftType is = type_of(document, path); is != type) {
    throw ModelError(
        cat(path, ": the adapter is of kind ", name_of(is), ", expected ", name_of(type)));
  }
  for (const auto& [name, value] : document.items()) {
    if (says_nothing(value) || is_note(name) || read(name, value, path)) continue;
    throw ModelError(cat(path, ": '", name, "' is ", value.dump(),
                         ": this changes what the adapter computes and is not supported"));
  }
  PeftNotes notes;
  if (const Json* base = document.find("base_model_name_or_path"); base && base->is_string())
    notes.base_model_name_or_path = base->as_string();
  if (const Json* task = document.find("task_type"))
    notes.task_type = task->is_string() ? task->as_string() : "";
  return notes;
}

std::string peft_config_text(PeftType type, const PeftNotes& notes, const Json& fields) {
  const auto text_or_null = [](const std::string& text) {
    return text.empty() ? Json() : Json(text);
  };
  Json::Object members = fields.items();
  members.push_back({"auto_mapping", nullptr});
  members.push_back({"base_model_name_or_path", text_or_null(notes.base_model_name_or_path)});
  members.push_back({"inference_mode", true});
  members.push_back({"peft_type", name_of(type)});
  members.push_back({"revision", nullptr});
  members.push_back({"task_type", text_or_null(notes.task_type)});
  std::sort(members.begin(), members.end(),
            [](const auto& a, const auto& b) { return a.key < b.key; });
  return Json(std::move(members)).dump(2);
}

}  // namespace fsdp::lora
