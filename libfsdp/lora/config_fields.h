// Reading and writing "adapter_config.json" of a PEFT directory, of any kind of adapter.
#pragma once

#include <array>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

#include "libfsdp/io/json.h"

namespace fsdp::lora {

enum class PeftType { kLora, kPrefixTuning, kAdaptionPrompt };
constexpr std::array<std::pair<PeftType, std::string_view>, 3> names_of(PeftType) {
  return {{{PeftType::kLora, "LORA"},
           {PeftType::kPrefixTuning, "PREFIX_TUNING"},
           {PeftType::kAdaptionPrompt, "ADAPTION_PROMPT"}}};
}

/// The kind of the adapter in a directory. Throws ModelError: no file, or a kind that is not known.
PeftType read_peft_type(const std::string& directory);

/// What every kind's file says beside what it computes.
struct PeftNotes {
  std::string base_model_name_or_path;
  std::string task_type = "CAUSAL_LM";
};

/// Whether the reader of a kind knows this field.
using ReadField =
    std::function<bool(const std::string& name, const io::Json& value, const std::string& where)>;

/// Calls `read` for every field that says something (not null, false or empty) and is no note.
/// Throws ModelError for another kind than `type`, and by its name for a field that `read` does not
/// know.
PeftNotes read_peft_fields(const std::string& directory, PeftType type, const ReadField& read);

/// The text of such a file: these fields and the notes, sorted.
std::string peft_config_text(PeftType type, const PeftNotes& notes, const io::Json& fields);

}  // namespace fsdp::lora
