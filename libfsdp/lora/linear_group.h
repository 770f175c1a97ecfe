// Linear layers of one input, each with a weight that may be frozen and packed, and at most one
// adapter: products and gradients, without autograd.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "libfsdp/lora/packed_weight.h"

namespace fsdp::lora {

/// A and B of one adapter of one weight.
struct LowRank {
  /// [r, in] of a Linear, [r, rows] of an Embedding, [r, in, kernel...] of a convolution.
  at::Tensor a;
  /// [out, r]; of an Embedding [features, r], of a convolution [out, r / groups, 1...].
  at::Tensor b;
  double scaling = 1;
};

/// A matrix [out, in] as it is kept: itself, or packed bytes.
struct FrozenWeight {
  at::Tensor tensor;
  std::shared_ptr<const PackedWeight> packed;  ///< Null = the tensor is the matrix.

  at::Tensor matrix(at::ScalarType type) const {
    return packed ? unpack(*packed, tensor, type) : tensor;
  }
};

/// x W^T + bias + scaling (u A^T) B^T.
struct PlainLinear {
  FrozenWeight weight;  ///< A plain one may be trained.
  at::Tensor bias;      ///< Undefined without one.
  LowRank adapter;      ///< A and B are undefined without one.
};

/// What fsdp::linear(x, weight, bias) computes, as such; nothing where that is more: several
/// adapters, dropout, DoRA.
std::optional<PlainLinear> plain_linear(const at::Tensor& weight, const at::Tensor& bias);

class LinearGroup {
 public:
  explicit LinearGroup(std::vector<PlainLinear> layers);

  /// All that can have a gradient: weight, bias, A and B of each layer, as far as there are.
  const std::vector<at::Tensor>& parameters() const { return parameters_; }
  /// Whether gradients of parameters need u.
  bool reads_input() const { return reads_input_; }

  struct Outputs {
    std::vector<at::Tensor> y;  ///< By layer: [N, out].
    std::vector<at::Tensor> t;  ///< By layer: u A^T, [N, r]; undefined without an adapter.
  };
  /// u: x, or x after dropout. Shapes: x, u [N, in].
  Outputs forward(const at::Tensor& x, const at::Tensor& u) const;

  struct Gradients {
    at::Tensor x;
    at::Tensor u;
    /// As parameters(); undefined where one is not needed, or went to its place.
    std::vector<at::Tensor> parameters;
  };
  struct Wanted {
    bool x = true;
    bool u = false;
    bool dropped = false;  ///< u is another tensor than x.
  };
  /// d: by layer, [N, out]. `u` may be undefined unless reads_input().
  Gradients backward(const std::vector<at::Tensor>& d, const at::Tensor& u,
                     const std::vector<at::Tensor>& t, const Wanted& wanted) const;

 private:
  void add_input_gradients(const std::vector<at::Tensor>& d, const std::vector<at::Tensor>& dt,
                           bool dropped, Gradients& result) const;

  std::vector<PlainLinear> layers_;
  std::vector<at::Tensor> parameters_;
  bool adapted_ = false;
  bool reads_input_ = false;
};

}  // namespace fsdp::lora
