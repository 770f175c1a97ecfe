#include "libfsdp/lora/functions.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <optional>
#include <utility>
#include <vector>

namespace fsdp::lora {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor rows_of(const Tensor& tensor) { return tensor.reshape({-1, tensor.size(-1)}); }

std::vector<int64_t> with_width(at::IntArrayRef sizes, int64_t width) {
  std::vector<int64_t> result = sizes.vec();
  result.back() = width;
  return result;
}

/// Carries what is no tensor from forward to backward.
struct GroupHolder : torch::CustomClassHolder {
  explicit GroupHolder(std::shared_ptr<const LinearGroup> value) : group(std::move(value)) {}
  std::shared_ptr<const LinearGroup> group;
};

// Arguments: x, u (or undefined), the group, its parameters.
struct LinearsFunction : torch::autograd::Function<LinearsFunction> {
  static variable_list forward(AutogradContext* context, const Tensor& x,
                               const std::optional<Tensor>& u,
                               const std::shared_ptr<const LinearGroup>& group, at::TensorList) {
    const Tensor& dropped = u ? *u : x;
    const Tensor rows = rows_of(dropped);
    LinearGroup::Outputs outputs = group->forward(u ? rows_of(x) : rows, rows);
    variable_list saved = {group->reads_input() ? rows : Tensor()};
    saved.insert(saved.end(), outputs.t.begin(), outputs.t.end());
    save_with_group(*context, std::move(saved), group);
    context->saved_data["sizes"] = x.sizes();
    context->saved_data["dropped"] = u.has_value();
    // Not a view: what a function returns as one may not be changed in place.
    for (Tensor& y : outputs.y) y = at::_unsafe_view(y, with_width(x.sizes(), y.size(1)));
    return std::move(outputs.y);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const std::vector<int64_t> sizes = context->saved_data["sizes"].toIntVector();
    const bool dropped = context->saved_data["dropped"].toBool();
    for (Tensor& d : gradients) d = rows_of(d);
    const auto t = saved.begin() + 1;
    const LinearGroup::Gradients result = saved_group(*context)->backward(
        gradients, saved[0], {t, t + static_cast<std::ptrdiff_t>(gradients.size())},
        {.x = context->needs_input_grad(0),
         .u = dropped && context->needs_input_grad(1),
         .dropped = dropped});
    variable_list results = {result.x.defined() ? result.x.view(sizes) : Tensor(),
                             result.u.defined() ? result.u.view(sizes) : Tensor(), Tensor()};
    results.insert(results.end(), result.parameters.begin(), result.parameters.end());
    return results;
  }
};

Tensor linear_of(const Tensor& x, const Tensor& u, PlainLinear layer) {
  const auto group = std::make_shared<const LinearGroup>(std::vector{std::move(layer)});
  return LinearsFunction::apply(x, u.defined() ? std::optional<Tensor>(u) : std::nullopt, group,
                                at::TensorList(group->parameters()))[0];
}

}  // namespace

void save_with_group(AutogradContext& context, variable_list saved,
                     const std::shared_ptr<const LinearGroup>& group) {
  saved.insert(saved.end(), group->parameters().begin(), group->parameters().end());
  context.save_for_backward(std::move(saved));
  context.saved_data["group"] = c10::IValue::make_capsule(c10::make_intrusive<GroupHolder>(group));
}

std::shared_ptr<const LinearGroup> saved_group(AutogradContext& context) {
  const auto capsule = context.saved_data.at("group").toCapsule();
  return c10::static_intrusive_pointer_cast<GroupHolder>(capsule)->group;
}

Tensor frozen_linear(const Tensor& x, const FrozenWeight& weight, const Tensor& bias) {
  return linear_of(x, {}, {weight, bias, {}});
}

Tensor lora_linear(const Tensor& x, const Tensor& u, const FrozenWeight& weight, const Tensor& bias,
                   const LowRank& adapter) {
  return linear_of(x, u, {weight, bias, adapter});
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
