#include "libfsdp/lora/parameter_names.h"

#include "libfsdp/base/error.h"

namespace fsdp::lora {
namespace {

std::string full_name(const AdapterParameters& adapter, const char* which,
                      const std::string& name) {
  if (adapter.kind == TargetKind::kEmbedding)
    return cat(adapter.module, ".lora_embedding_", which, ".", name);
  return cat(adapter.module, ".lora_", which, ".", name, ".weight");
}

}  // namespace

std::string a_name(const AdapterParameters& adapter, const std::string& name) {
  return full_name(adapter, "A", name);
}

std::string b_name(const AdapterParameters& adapter, const std::string& name) {
  return full_name(adapter, "B", name);
}

std::string magnitude_name(const AdapterParameters& adapter, const std::string& name) {
  return cat(adapter.module, ".lora_magnitude_vector.", name, ".weight");
}

std::string peft_name(const std::string& parameter, const std::string& name) {
  std::string result = parameter;
  for (const char* part : {".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.",
                           ".lora_magnitude_vector."}) {
    const size_t at = result.find(cat(part, name));
    if (at == std::string::npos) continue;
    result.erase(at + std::string(part).size() - 1, name.size() + 1);
    // A vector of magnitudes is a parameter of its own in the files.
    if (std::string(part) == ".lora_magnitude_vector." && result.ends_with(".weight"))
      result.erase(result.size() - std::string(".weight").size());
    break;
  }
  return "base_model.model." + result;
}

}  // namespace fsdp::lora
