// Keys and values of the tokens generated so far.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "libfsdp/models/config.h"

namespace fsdp::models {

/// One sequence. Keys are stored with rope applied.
///
/// Memory: 2 * num_hidden_layers * num_kv_heads * capacity * head_dim elements: fp32 on the CPU,
/// the model's dtype elsewhere.
class KvCache {
 public:
  /// `options`: device and dtype of the model that will use it.
  KvCache(const LlamaConfig& config, int64_t capacity, const at::TensorOptions& options);

  int64_t length() const { return length_; }
  int64_t capacity() const { return capacity_; }

  /// Claims room for `count` more tokens and gives the first one's place. Throws ModelError when it
  /// is full.
  int64_t append(int64_t count);

  /// Forgets all tokens from `length` on.
  void truncate(int64_t length);

  /// [num_kv_heads, capacity, head_dim] of one layer.
  at::Tensor& keys(int64_t layer) { return keys_.at(static_cast<size_t>(layer)); }
  at::Tensor& values(int64_t layer) { return values_.at(static_cast<size_t>(layer)); }

 private:
  int64_t capacity_;
  int64_t length_ = 0;
  std::vector<at::Tensor> keys_, values_;
};

}  // namespace fsdp::models
