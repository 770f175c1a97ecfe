#include "libfsdp/lora/functions.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <optional>
#include <utility>
#include <vector>

#include "libfsdp/shard/gradient_sink.h"

namespace fsdp::lora {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor rows_of(const Tensor& tensor) { return tensor.reshape({-1, tensor.size(-1)}); }

/// Carries what is no tensor from forward to backward.
struct PackedHolder : torch::CustomClassHolder {
  explicit PackedHolder(std::shared_ptr<const PackedWeight> value) : packed(std::move(value)) {}
  std::shared_ptr<const PackedWeight> packed;
};

void keep_packed(AutogradContext* context, const std::shared_ptr<const PackedWeight>& packed) {
  if (packed)
    context->saved_data["packed"] =
        c10::IValue::make_capsule(c10::make_intrusive<PackedHolder>(packed));
}

Tensor matrix_of(AutogradContext* context, const Tensor& weight, at::ScalarType type) {
  const auto found = context->saved_data.find("packed");
  if (found == context->saved_data.end()) return weight;
  const auto capsule = found->second.toCapsule();
  return unpack(*c10::static_intrusive_pointer_cast<PackedHolder>(capsule)->packed, weight, type);
}

// Arguments: x, W, bias (or undefined), how W is packed.
struct FrozenLinear : torch::autograd::Function<FrozenLinear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias,
                        const std::shared_ptr<const PackedWeight>& packed) {
    context->save_for_backward({weight, bias.value_or(Tensor())});
    keep_packed(context, packed);
    return at::linear(x, FrozenWeight{weight, packed}.matrix(x.scalar_type()), bias);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &weight = saved[0], &bias = saved[1];
    const Tensor d = rows_of(gradients[0]);
    Tensor dx, d_bias;
    if (context->needs_input_grad(0)) {
      const Tensor matrix = matrix_of(context, weight, d.scalar_type());
      std::vector<int64_t> shape = gradients[0].sizes().vec();
      shape.back() = matrix.size(1);
      dx = at::mm(d, matrix).view(shape);
    }
    if (bias.defined() && bias.requires_grad()) d_bias = linear_bias_gradient(bias, d);
    return {dx, Tensor(), d_bias, Tensor()};
  }
};

// Arguments: x, u (undefined = x), W, bias (or undefined), A, B, scaling, how W is packed.
struct LoraLinear : torch::autograd::Function<LoraLinear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const std::optional<Tensor>& u,
                        const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& a,
                        const Tensor& b, double scaling,
                        const std::shared_ptr<const PackedWeight>& packed) {
    const Tensor& dropped = u ? *u : x;
    Tensor y = at::linear(x, FrozenWeight{weight, packed}.matrix(x.scalar_type()), bias);
    const Tensor t = at::mm(rows_of(dropped), a.t());
    Tensor rows = y.view({-1, y.size(-1)});
    at::addmm_out(rows, rows, t, b.t(), 1, scaling);
    context->save_for_backward({dropped, weight, bias.value_or(Tensor()), a, b, t});
    context->saved_data["scaling"] = scaling;
    context->saved_data["dropped"] = u.has_value();
    keep_packed(context, packed);
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &u = saved[0], &weight = saved[1], &bias = saved[2], &a = saved[3], &b = saved[4],
                 &t = saved[5];
    const double scaling = context->saved_data["scaling"].toDouble();
    const bool dropped = context->saved_data["dropped"].toBool();
    const Tensor d = rows_of(gradients[0]);
    const Tensor dt = at::mm(d, b).mul_(scaling);
    Tensor dx, du, d_bias, da, db;
    if (context->needs_input_grad(0)) {
      Tensor rows = at::mm(d, matrix_of(context, weight, d.scalar_type()));
      if (!dropped) at::addmm_out(rows, rows, dt, a);
      dx = rows.view(u.sizes());
    }
    if (dropped && context->needs_input_grad(1)) du = at::mm(dt, a).view(u.sizes());
    if (bias.defined() && bias.requires_grad()) d_bias = linear_bias_gradient(bias, d);
    if (a.requires_grad()) da = linear_weight_gradient(a, dt, rows_of(u));
    if (b.requires_grad()) db = linear_weight_gradient(b, d, t * scaling);
    return {dx, du, Tensor(), d_bias, da, db, Tensor(), Tensor()};
  }
};

std::optional<Tensor> some(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

}  // namespace

Tensor frozen_linear(const Tensor& x, const FrozenWeight& weight, const Tensor& bias) {
  return FrozenLinear::apply(x, weight.tensor, some(bias), weight.packed);
}

Tensor lora_linear(const Tensor& x, const Tensor& u, const FrozenWeight& weight, const Tensor& bias,
                   const LowRank& adapter) {
  return LoraLinear::apply(x, some(u), weight.tensor, some(bias), adapter.a, adapter.b,
                           adapter.scaling, weight.packed);
}

Tensor adapted_weight(TargetKind kind, const Tensor& weight, const LowRank& adapter) {
  const Tensor a = adapter.a.flatten(1), b = adapter.b.flatten(1);
  if (kind == TargetKind::kEmbedding) return at::addmm(weight, a.t(), b.t(), 1, adapter.scaling);
  return at::addmm(weight.flatten(1), b, a, 1, adapter.scaling).view(weight.sizes());
}

Tensor output_norms(TargetKind kind, const Tensor& weight, const LowRank& adapter) {
  const Tensor whole =
      adapted_weight(kind, weight.to(at::kFloat),
                     {adapter.a.to(at::kFloat), adapter.b.to(at::kFloat), adapter.scaling});
  const int64_t summed = kind == TargetKind::kEmbedding ? 0 : 1;
  return at::linalg_vector_norm(whole.flatten(1), 2, at::IntArrayRef{summed});
}

Tensor dora_scale(TargetKind kind, const Tensor& weight, const LowRank& adapter,
                  const Tensor& magnitude) {
  const Tensor norms = output_norms(kind, weight.detach(),
                                    {adapter.a.detach(), adapter.b.detach(), adapter.scaling});
  return (magnitude.flatten() / norms).to(weight.scalar_type());
}

Tensor dora_linear(const Tensor& x, const Tensor& u, const FrozenWeight& weight, const Tensor& bias,
                   const LowRank& adapter, const Tensor& magnitude) {
  const Tensor scale =
      dora_scale(TargetKind::kLinear, weight.matrix(x.scalar_type()), adapter, magnitude);
  if (!u.defined()) {
    const Tensor product = lora_linear(x, {}, weight, {}, adapter) * scale;
    return bias.defined() ? product + bias : product;
  }
  // As PEFT: what dropout leaves of x counts only beyond the base.
  const Tensor base = frozen_linear(x, weight, bias) - frozen_linear(u, weight, {});
  return base + lora_linear(u, {}, weight, {}, adapter) * scale;
}

Tensor convolved_low_rank(const Tensor& u, const LowRank& adapter, int64_t groups,
                          const Convolution& convolution) {
  const Tensor rank = convolution(u, adapter.a, {}, 1);
  const auto project = [&](auto conv) {
    return conv(rank, adapter.b, std::nullopt, 1, 0, 1, groups) * adapter.scaling;
  };
  switch (adapter.b.dim()) {
    case 3:
      return project([](auto&&... args) { return at::conv1d(args...); });
    case 4:
      return project([](auto&&... args) { return at::conv2d(args...); });
    default:
      return project([](auto&&... args) { return at::conv3d(args...); });
  }
}

Tensor dora_convolution(const Tensor& x, const Tensor& u, const Tensor& weight, const Tensor& bias,
                        const LowRank& adapter, const Tensor& magnitude,
                        const Convolution& convolution) {
  std::vector<int64_t> channels(static_cast<size_t>(weight.dim()) - 1, 1);
  channels[0] = -1;
  const Tensor scale =
      dora_scale(TargetKind::kConvolution, weight, adapter, magnitude).view(channels);
  const Tensor& dropped = u.defined() ? u : x;
  const Tensor base = convolution(dropped, weight, {}, 1);
  const Tensor product = (base + convolved_low_rank(dropped, adapter, 1, convolution)) * scale;
  if (u.defined()) return convolution(x, weight, bias, 1) - base + product;
  return bias.defined() ? product + bias.view(channels) : product;
}

}  // namespace fsdp::lora
