// Modules that can have adapters.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <optional>
#include <string>

#include "libfsdp/shard/weight_adapter.h"

namespace fsdp::lora {

enum class TargetKind { kLinear, kEmbedding, kConvolution };

/// A base of a module whose forward is fsdp::linear, or fsdp::embedding, of its weight.
class Target {
 public:
  virtual ~Target() = default;
  virtual TargetKind target_kind() const = 0;
  virtual const at::Tensor& target_weight() const = 0;
};

/// A module as adapters see it.
struct TargetLayer {
  TargetKind kind = TargetKind::kLinear;
  /// [out, in] of a Linear, [rows, features] of an Embedding, [out, in / groups, ...] of a
  /// convolution.
  at::Tensor weight;
  Operations operations = Operations::kOurs;
  int64_t groups = 1;
  std::string refusal;  ///< Why it cannot have an adapter; empty = it can.
};

/// A Target, or LibTorch's own Linear, Embedding, Conv1d, Conv2d, Conv3d (and what is derived from
/// them); nothing for other modules.
std::optional<TargetLayer> find_target(const torch::nn::Module& module);

}  // namespace fsdp::lora
