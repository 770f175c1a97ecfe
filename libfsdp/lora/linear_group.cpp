#include "libfsdp/lora/linear_group.h"

#include <ATen/ATen.h>

#include <utility>

#include "libfsdp/lora/linear_base.h"
#include "libfsdp/shard/gradient_sink.h"

namespace fsdp::lora {
namespace {

using at::Tensor;

std::optional<Tensor> some(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

void add_product(Tensor& sum, const Tensor& a, const Tensor& b) {
  if (sum.defined()) {
    at::addmm_out(sum, sum, a, b);
  } else {
    sum = at::mm(a, b);
  }
}

}  // namespace

std::optional<PlainLinear> plain_linear(const Tensor& weight, const Tensor& bias) {
  PlainLinear plain{.weight = {weight, nullptr}, .bias = bias};
  WeightAdapter* adapter = weight_adapter(weight);
  if (!adapter) return plain;
  const auto* base = dynamic_cast<const LinearBase*>(adapter);
  auto low_rank = base ? base->plain_adapter() : std::nullopt;
  if (!low_rank) return std::nullopt;
  plain.weight.packed = base->packed;
  plain.adapter = std::move(*low_rank);
  return plain;
}

LinearGroup::LinearGroup(std::vector<PlainLinear> layers) : layers_(std::move(layers)) {
  for (const PlainLinear& layer : layers_) {
    const LowRank& adapter = layer.adapter;
    for (const Tensor& tensor : {layer.weight.tensor, layer.bias, adapter.a, adapter.b})
      if (tensor.defined()) parameters_.push_back(tensor);
    adapted_ = adapted_ || adapter.a.defined();
    reads_input_ = reads_input_ || layer.weight.tensor.requires_grad() ||
                   (adapter.a.defined() && adapter.a.requires_grad());
  }
}

LinearGroup::Outputs LinearGroup::forward(const Tensor& x, const Tensor& u) const {
  Outputs outputs;
  for (const PlainLinear& layer : layers_) {
    Tensor y = at::linear(x, layer.weight.matrix(x.scalar_type()), some(layer.bias));
    Tensor t;
    if (const auto& [a, b, scaling] = layer.adapter; a.defined()) {
      t = at::mm(u, a.t());
      at::addmm_out(y, y, t, b.t(), 1, scaling);
    }
    outputs.y.push_back(std::move(y));
    outputs.t.push_back(std::move(t));
  }
  return outputs;
}

// Without adapters one chain of products; with them each layer's own sum, the last layer first: the
// bits of layers apart, which autograd adds up so.
void LinearGroup::add_input_gradients(const std::vector<Tensor>& d, const std::vector<Tensor>& dt,
                                      bool dropped, Gradients& result) const {
  const auto matrix = [&](size_t i) { return layers_[i].weight.matrix(d[i].scalar_type()); };
  if (!adapted_) {
    for (size_t i = 0; i < d.size(); ++i) add_product(result.x, d[i], matrix(i));
    return;
  }
  for (size_t i = d.size(); i-- > 0;) {
    Tensor dx = at::mm(d[i], matrix(i));
    if (dt[i].defined() && !dropped) at::addmm_out(dx, dx, dt[i], layers_[i].adapter.a);
    result.x = result.x.defined() ? result.x.add_(dx) : dx;
  }
}

LinearGroup::Gradients LinearGroup::backward(const std::vector<Tensor>& d, const Tensor& u,
                                             const std::vector<Tensor>& t,
                                             const Wanted& wanted) const {
  Gradients result;
  std::vector<Tensor> dt(layers_.size());
  for (size_t i = 0; i < layers_.size(); ++i) {
    const LowRank& adapter = layers_[i].adapter;
    if (!adapter.a.defined()) continue;
    dt[i] = at::mm(d[i], adapter.b).mul_(adapter.scaling);
    if (wanted.u) add_product(result.u, dt[i], adapter.a);
  }
  if (wanted.x) add_input_gradients(d, dt, wanted.dropped, result);
  const auto add = [&](const Tensor& parameter, auto gradient) {
    if (parameter.defined())
      result.parameters.push_back(parameter.requires_grad() ? gradient() : Tensor());
  };
  for (size_t i = 0; i < layers_.size(); ++i) {
    const PlainLinear& layer = layers_[i];
    const Tensor &weight = layer.weight.tensor, &a = layer.adapter.a, &b = layer.adapter.b;
    add(weight, [&] { return linear_weight_gradient(weight, d[i], u); });
    add(layer.bias, [&] { return linear_bias_gradient(layer.bias, d[i]); });
    add(a, [&] { return linear_weight_gradient(a, dt[i], u); });
    add(b, [&] { return linear_weight_gradient(b, d[i], t[i] * layer.adapter.scaling); });
  }
  return result;
}

}  // namespace fsdp::lora
