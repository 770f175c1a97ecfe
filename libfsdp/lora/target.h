// What a module tells of itself so that it can have adapters.
#pragma once

#include <ATen/core/Tensor.h>

namespace fsdp::lora {

enum class TargetKind { kLinear, kEmbedding };

/// A base of a module whose forward is fsdp::linear, or fsdp::embedding, of its weight. (LibTorch's
/// own Linear and Embedding compute elsewhere: they cannot have adapters.)
class Target {
 public:
  virtual ~Target() = default;
  virtual TargetKind target_kind() const = 0;
  virtual const at::Tensor& target_weight() const = 0;
};

}  // namespace fsdp::lora
