#include "libfsdp/shard/module_units.h"

#include <ATen/ATen.h>

#include <map>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/shell.h"

namespace fsdp {
namespace {

size_t at(int index) { return static_cast<size_t>(index); }

// Whether `name` lies in the module called `prefix` ("" holds everything).
bool lies_in(const std::string& name, const std::string& prefix) {
  return prefix.empty() ||
         (name.size() > prefix.size() && name[prefix.size()] == '.' && name.starts_with(prefix));
}

class Finder {
 public:
  explicit Finder(const std::function<bool(const std::string&)>& in_root) : in_root_(in_root) {}

  std::vector<ModuleUnit> run(torch::nn::Module& model) {
    units_.emplace_back();
    names_ = {{"", 0}};
    for (const auto& entry : model.named_modules()) {
      if (auto* hook = dynamic_cast<UnitHook*>(entry.value().get())) add_unit(entry.key(), hook);
    }
    for (const auto& entry : model.named_parameters()) add_parameter(entry.key(), entry.value());
    for (Found& found : parameters_) {
      found.parameter.info.unit = units_[at(found.unit)].name;
      units_[at(found.unit)].parameters.push_back(std::move(found.parameter));
    }
    return std::move(units_);
  }

 private:
  struct Found {
    ModuleParameter parameter;
    int unit = 0;
  };

  // The innermost unit with a name that `name` lies in: outer ones were added first.
  int unit_of(const std::string& name) const {
    int unit = 0;
    size_t longest = 0;
    for (const auto& [prefix, index] : names_) {
      if (prefix.size() < longest || !lies_in(name, prefix)) continue;
      unit = index;
      longest = prefix.size();
    }
    return unit;
  }

  void add_unit(const std::string& name, UnitHook* hook) {
    if (name.empty()) {
      throw ConfigError("the model itself is a Unit: shard a module that contains units (or none)");
    }
    if (hook->runtime()) throw ConfigError(cat("unit '", name, "' has been sharded before"));
    const auto [known, fresh] = unit_of_hook_.emplace(hook, static_cast<int>(units_.size()));
    const int parent = unit_of(name);
    names_.emplace_back(name, known->second);
    if (!fresh) return;
    units_.push_back({.name = name, .hook = hook, .parent = parent, .parameters = {}});
  }

  int common(int a, int b) const {
    while (a != b) (a > b ? a : b) = units_[at(std::max(a, b))].parent;
    return a;
  }

  void add_parameter(const std::string& name, const at::Tensor& tensor) {
    const int unit = in_root_ && in_root_(name) ? 0 : unit_of(name);
    const auto [known, fresh] = known_.emplace(tensor.unsafeGetTensorImpl(), parameters_.size());
    if (!fresh) {
      Found& found = parameters_[known->second];
      found.parameter.info.aliases.push_back(name);
      found.unit = common(found.unit, unit);
      return;
    }
    const at::ScalarType type = tensor.scalar_type();
    if (!at::isFloatingType(type) && type != at::kByte && type != at::kChar) {
      throw ConfigError(cat("parameter '", name, "' is ", c10::toString(type),
                            ": only floating parameters, and bytes of packed ones, can be sharded. "
                            "Hint: register it as a buffer."));
    }
    parameters_.push_back({.parameter = {.info = {.name = name,
                                                  .shape = tensor.sizes().vec(),
                                                  .trainable = tensor.requires_grad(),
                                                  .unit = {},
                                                  .aliases = {}},
                                         .tensor = tensor},
                           .unit = unit});
  }

  const std::function<bool(const std::string&)>& in_root_;
  std::vector<ModuleUnit> units_;
  std::vector<std::pair<std::string, int>> names_;  // All names of units.
  std::map<const UnitHook*, int> unit_of_hook_;
  std::vector<Found> parameters_;
  std::map<const c10::TensorImpl*, size_t> known_;
};

DType dtype_of(const ModuleParameter& parameter, const ShardOptions& options) {
  const DType own = to_dtype(parameter.tensor.scalar_type());
  if (own == DType::kU8 || own == DType::kI8) return own;
  if (options.param_dtype) return *options.param_dtype;
  if (own == DType::kF32 || own == DType::kBF16 || own == DType::kF16) return own;
  throw ConfigError(cat("parameter '", parameter.info.name, "' is ", dtype_name(own),
                        ": expected float32, bfloat16 or float16. Hint: choose a param_dtype."));
}

}  // namespace

std::vector<ModuleUnit> find_units(torch::nn::Module& model,
                                   const std::function<bool(const std::string&)>& in_root) {
  return Finder(in_root).run(model);
}

std::vector<plan::UnitSpec> specify(const std::vector<ModuleUnit>& units,
                                    const ShardOptions& options) {
  std::vector<plan::UnitSpec> specs;
  const bool sums = options.placement.accumulation == plan::Accumulation::kUnsharded;
  for (const ModuleUnit& unit : units) {
    plan::UnitSpec spec{.name = unit.name, .params = {}, .parent = unit.parent};
    for (const ModuleParameter& parameter : unit.parameters) {
      const ParameterInfo& info = parameter.info;
      spec.params.push_back(
          {.name = info.name,
           .shape = info.shape,
           .dtype = dtype_of(parameter, options),
           .trainable = info.trainable,
           .group = options.param_group ? options.param_group(info.name, info.shape) : 0,
           // Micro-batches that are summed in the slot are summed in fp32.
           .reduce_dtype = sums ? DType::kF32 : options.reduce_dtype});
    }
    specs.push_back(std::move(spec));
  }
  return specs;
}

void refuse_meta_buffers(const torch::nn::Module& model) {
  for (const auto& buffer : model.named_buffers()) {
    if (buffer.value().defined() && buffer.value().is_meta()) {
      throw ConfigError(
          cat("buffer '", buffer.key(),
              "' is on the meta device: nobody would fill it. Hint: build buffers on the CPU."));
    }
  }
}

}  // namespace fsdp
