#include "libfsdp/models/heads.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>

#include <vector>

namespace fsdp::models {

using at::Tensor;

Tensor split_heads(const Tensor& x, int64_t heads) {
  return x.view({x.size(0), heads, -1}).transpose(0, 1);
}

Tensor join_heads(const Tensor& x) { return x.transpose(0, 1).flatten(1); }

Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const std::vector<Tensor> halves = x.chunk(2, -1);
  const Tensor c = cos.to(x.scalar_type()), s = sin.to(x.scalar_type());
  return at::cat({halves[0] * c - halves[1] * s, halves[1] * c + halves[0] * s}, -1);
}

}  // namespace fsdp::models
