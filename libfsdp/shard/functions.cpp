#include "libfsdp/shard/functions.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "libfsdp/shard/gradient_sink.h"
#include "libfsdp/shard/weight_adapter.h"

namespace fsdp {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor rows_of(const Tensor& tensor) { return tensor.reshape({-1, tensor.size(-1)}); }

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias) {
    context->save_for_backward({input, weight, bias.value_or(Tensor())});
    return at::linear(input, weight, bias);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &bias = saved[2];
    const Tensor d = rows_of(gradients[0]);
    Tensor d_input;
    Tensor d_weight;
    Tensor d_bias;
    if (context->needs_input_grad(0)) d_input = at::mm(d, weight).view(input.sizes());
    if (context->needs_input_grad(1)) d_weight = linear_weight_gradient(weight, d, rows_of(input));
    if (bias.defined() && bias.requires_grad()) d_bias = linear_bias_gradient(bias, d);
    return {d_input, d_weight, d_bias};
  }
};

// Gradient rows of a table: each id once, equal ids summed in their order in fp32.
struct Rows {
  Tensor ids;
  Tensor sums;
};

Rows sum_rows(const Tensor& ids, const Tensor& d) {
  const auto [unique, place, counts] = at::_unique2(ids, /*sorted=*/true, /*return_inverse=*/true);
  Tensor sums = at::zeros({unique.numel(), d.size(1)}, d.options().dtype(at::kFloat));
  sums.index_add_(0, place, d.to(at::kFloat));
  return {unique, sums.to(d.scalar_type())};
}

struct EmbeddingFunction : torch::autograd::Function<EmbeddingFunction> {
  static Tensor forward(AutogradContext* context, const Tensor& weight, const Tensor& ids,
                        bool tied) {
    context->save_for_backward({weight, ids});
    context->saved_data["tied"] = tied;
    return weight.index_select(0, ids);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &weight = saved[0], &ids = saved[1];
    const Tensor d = gradients[0].contiguous();
    if (const auto place = gradient_place(weight, d.scalar_type())) {
      Tensor to = place->tensor;
      if (!place->accumulate) to.zero_();
      const Rows rows = sum_rows(ids, d);
      to.index_add_(0, rows.ids, rows.sums);
      return {Tensor(), Tensor(), Tensor()};
    }
    if (context->saved_data["tied"].toBool() || weight.grad().defined()) {
      const Rows rows = sum_rows(ids, d);
      return {at::_sparse_coo_tensor_unsafe(rows.ids.unsqueeze(0), rows.sums, weight.sizes())
                  ._coalesced_(true),
              Tensor(), Tensor()};
    }
    return {at::embedding_dense_backward(d, ids, weight.size(0), -1, false), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor linear_weight_gradient(const Tensor& weight, const Tensor& d, const Tensor& x) {
  const auto place = gradient_place(weight, d.scalar_type());
  if (!place) return at::mm(d.t(), x);
  Tensor to = place->tensor;
  if (place->accumulate) {
    at::addmm_out(to, to, d.t(), x);
  } else {
    at::mm_out(to, d.t(), x);
  }
  return {};
}

Tensor linear_bias_gradient(const Tensor& bias, const Tensor& d) {
  const auto place = gradient_place(bias, d.scalar_type());
  if (!place) return d.sum(0);
  Tensor to = place->tensor;
  if (place->accumulate) {
    to.add_(d.sum(0));
  } else {
    at::sum_out(to, d, at::IntArrayRef{0});
  }
  return {};
}

Tensor linear(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  if (WeightAdapter* adapter = weight_adapter(weight)) return adapter->linear(input, weight, bias);
  return base_linear(input, weight, bias);
}

Tensor base_linear(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  return LinearFunction::apply(input, weight,
                               bias.defined() ? std::optional<Tensor>(bias) : std::nullopt);
}

Tensor embedding(const Tensor& weight, const Tensor& ids, bool tied) {
  if (WeightAdapter* adapter = weight_adapter(weight)) return adapter->embedding(weight, ids);
  return base_embedding(weight, ids, tied);
}

Tensor base_embedding(const Tensor& weight, const Tensor& ids, bool tied) {
  return EmbeddingFunction::apply(weight, ids, tied);
}

}  // namespace fsdp
