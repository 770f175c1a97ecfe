// What modules tell of themselves so that tokens can be trained in front of attention: prefix
// tuning and llama-adapter.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

namespace fsdp::lora {

/// Sizes of a model's attention.
struct PrefixShape {
  int64_t layers = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;

  int64_t width() const { return layers * 2 * kv_heads * head_dim; }
};

/// Keys and values that every layer's attention sees in front of every sequence.
struct Prefix {
  int64_t tokens = 0;  ///< 0 = there is none.
  /// Called in each forward of the whole model: [tokens, layers * 2 * kv_heads * head_dim]; of each
  /// layer the keys, which are not rotated, then the values.
  std::function<at::Tensor()> make;
};

/// A base of the module whose forward runs all layers. With a prefix, positions of every sequence
/// count from prefix.tokens.
class PrefixTarget {
 public:
  virtual ~PrefixTarget() = default;
  virtual PrefixShape prefix_shape() const = 0;
  virtual void set_prefix(Prefix prefix) = 0;
};

/// Tokens that an attention layer attends to on the side: gate * softmax(q K^T / sqrt(d)) V over
/// these alone, K and V made by the layer's projections, is added to what it gives.
struct AdaptionPrompt {
  at::Tensor tokens;  ///< [1, n, hidden]; undefined = none.
  at::Tensor gate;    ///< [1]
};

/// A base of an attention layer.
class AdaptionTarget {
 public:
  virtual ~AdaptionTarget() = default;
  virtual int64_t hidden_size() const = 0;
  /// Throws ConfigError when this layer cannot have one.
  virtual void set_adaption(AdaptionPrompt prompt) = 0;
};

}  // namespace fsdp::lora
