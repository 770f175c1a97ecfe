// Which parameters of a model are trained.
#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fsdp::lora {

/// What freeze() and unfreeze() choose: parameters whose own name, or that of a module around them,
/// is one of these or ends with "." and one of these ("norm", "layers.3"), or fits one that is a
/// regular expression for the whole name (".*_proj"), by the rule of LoraConfig::target_modules.
using Names = std::vector<std::string>;

/// Takes the gradient from, or gives it to, the parameters that `names` choose. Before
/// fully_shard(): a frozen parameter has neither gradient, nor reduction, nor optimizer state
/// there, and gradients pass through it. Parameters of several names (tied) are chosen by any of
/// them. Returns the number of elements. Throws ConfigError for a name that chooses nothing.
int64_t freeze(torch::nn::Module& model, const Names& names);
int64_t unfreeze(torch::nn::Module& model, const Names& names);

/// Freezes the first `count` modules of the list "layers": those of a decoder, not its embedding.
/// Throws ConfigError where there are fewer.
int64_t freeze_layers(torch::nn::Module& model, int64_t count);

}  // namespace fsdp::lora
