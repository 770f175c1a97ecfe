#include "libfsdp/models/layers.h"

#include <ATen/ops/empty.h>

#include "libfsdp/models/functions.h"
#include "libfsdp/shard/functions.h"

namespace fsdp::models {

LinearImpl::LinearImpl(int64_t in_features, int64_t out_features, bool with_bias,
                       const at::TensorOptions& options) {
  weight = register_parameter("weight", at::empty({out_features, in_features}, options));
  if (with_bias) bias = register_parameter("bias", at::empty({out_features}, options));
}

at::Tensor LinearImpl::forward(const at::Tensor& input) {
  return fsdp::linear(input, weight, bias);
}

EmbeddingImpl::EmbeddingImpl(int64_t rows, int64_t features, bool tied,
                             const at::TensorOptions& options)
    : tied_(tied) {
  weight = register_parameter("weight", at::empty({rows, features}, options));
}

at::Tensor EmbeddingImpl::forward(const at::Tensor& ids) {
  return fsdp::embedding(weight, ids, tied_);
}

RmsNormImpl::RmsNormImpl(int64_t features, double eps, const at::TensorOptions& options)
    : eps_(eps) {
  weight = register_parameter("weight", at::empty({features}, options));
}

at::Tensor RmsNormImpl::forward(const at::Tensor& input) { return rms_norm(input, weight, eps_); }

std::vector<at::Tensor> norm_linears(const at::Tensor& x, const RmsNorm& norm,
                                     const std::vector<Linear>& layers) {
  std::vector<at::Tensor> weights, biases;
  for (const Linear& layer : layers) {
    weights.push_back(layer->weight);
    if (layer->bias.defined()) biases.push_back(layer->bias);
  }
  return norm_linears(x, norm->weight, norm->eps(), weights, biases);
}

}  // namespace fsdp::models
