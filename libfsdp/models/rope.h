// Rotary position embedding: the table of angles.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>

#include "libfsdp/models/config.h"

namespace fsdp::models {

/// Inverse frequencies, fp32 [head_dim / 2], computed as transformers does.
at::Tensor rope_inverse_frequencies(const RopeConfig& config, int64_t head_dim);

/// Cosines and sines of positions, computed when needed and kept (outside of a module's parameters
/// and buffers). Not thread-safe: one per model.
class RopeTable {
 public:
  RopeTable(const RopeConfig& config, int64_t head_dim) : config_(config), head_dim_(head_dim) {}

  /// position_ids int64 [N] -> {cos, sin}, fp32 [N, head_dim / 2], on the device of position_ids.
  std::pair<at::Tensor, at::Tensor> lookup(const at::Tensor& position_ids);

 private:
  void grow(int64_t length);

  RopeConfig config_;
  int64_t head_dim_;
  at::Tensor cos_, sin_;  // fp32 [length, head_dim / 2], CPU
};

}  // namespace fsdp::models
