#include "libfsdp/lora/trainable.h"

#include <algorithm>
#include <set>

#include "libfsdp/base/error.h"
#include "libfsdp/lora/name_match.h"

namespace fsdp::lora {
namespace {

// Of the parameter itself, or of a module around it.
bool chooses(const std::string& name, const std::string& parameter) {
  for (size_t end = parameter.size(); end != std::string::npos;
       end = end == 0 ? std::string::npos : parameter.rfind('.', end - 1)) {
    const std::string around = parameter.substr(0, end);
    if (names_one({name}, around) || matches_whole(name, around)) return true;
  }
  return false;
}

int64_t set_trained(torch::nn::Module& model, const Names& names, bool trained) {
  // With all names of tied parameters.
  const auto parameters = model.named_parameters();
  int64_t numel = 0;
  std::set<const at::TensorImpl*> counted;
  for (const std::string& name : names) {
    bool any = false;
    for (const auto& parameter : parameters) {
      if (!chooses(name, parameter.key())) continue;
      any = true;
      at::Tensor tensor = parameter.value();
      tensor.set_requires_grad(trained);
      if (counted.insert(tensor.unsafeGetTensorImpl()).second) numel += tensor.numel();
    }
    if (!any) {
      throw ConfigError(
          cat("no parameter is chosen by '", name, "'. There is ",
              parameters.is_empty() ? "none" : cat("for one: ", parameters[0].key())));
    }
  }
  return numel;
}

}  // namespace

int64_t freeze(torch::nn::Module& model, const Names& names) {
  return set_trained(model, names, false);
}

int64_t unfreeze(torch::nn::Module& model, const Names& names) {
  return set_trained(model, names, true);
}

int64_t freeze_layers(torch::nn::Module& model, int64_t count) {
  Names names;
  for (int64_t i = 0; i < count; ++i) names.push_back(cat("layers.", i));
  return freeze(model, names);
}

}  // namespace fsdp::lora
