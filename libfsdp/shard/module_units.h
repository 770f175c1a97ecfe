// What a module tree looks like to the engine: units, and which parameter belongs to which.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <functional>
#include <string>
#include <vector>

#include "libfsdp/plan/layout.h"
#include "libfsdp/shard/options.h"
#include "libfsdp/shard/unit.h"

namespace fsdp {

/// A parameter of the sharded module, by its name in named_parameters().
struct ParameterInfo {
  std::string name;
  std::vector<int64_t> shape;
  bool trainable = true;
  std::string unit;                  ///< "" = the root.
  std::vector<std::string> aliases;  ///< Other names of the same tensor (tied parameters).
};

struct ModuleParameter {
  ParameterInfo info;
  at::Tensor tensor;
};

struct ModuleUnit {
  std::string name;          ///< "" = the root, which comes first.
  UnitHook* hook = nullptr;  ///< Null for the root.
  int parent = 0;            ///< The unit around it.
  std::vector<ModuleParameter> parameters;
};

/// The units of `model`, outer ones before inner ones, and all its parameters.
///
/// A parameter with several names (tied) belongs to the innermost unit that contains them all, one
/// that `in_root` chooses to the root; a unit registered under several names is one unit. Throws
/// ConfigError when the model itself is a unit, when a unit has been sharded before, or a parameter
/// is not of a floating type.
std::vector<ModuleUnit> find_units(
    torch::nn::Module& model, const std::function<bool(const std::string& name)>& in_root = {});

/// What the engine lays out.
std::vector<plan::UnitSpec> specify(const std::vector<ModuleUnit>& units,
                                    const ShardOptions& options);

/// Throws ConfigError for a buffer on the meta device, which nobody would fill.
void refuse_meta_buffers(const torch::nn::Module& model);

}  // namespace fsdp
