#include "libfsdp/models/functions.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/lora/functions.h"
#include "libfsdp/models/cpu_data.h"
#include "libfsdp/models/cpu_loops.h"
#include "libfsdp/shard/functions.h"

namespace fsdp::models {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kRowsPerTask = 64;  // fixed, so that sums do not depend on the number of threads
constexpr int64_t kElementsPerTask = 1 << 15;

struct Normed {
  Tensor y;
  Tensor rstd;  // fp32, one a row
};

Normed rms_norm_forward(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t width = weight.numel(), rows = x.numel() / width;
  Normed result{at::empty_like(x), at::empty({rows}, x.options().dtype(at::kFloat))};
  for_cpu_type(x, [&](auto tag) {
    using T = decltype(tag);
    at::parallel_for(0, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
      rms_norm_rows(in<T>(x) + begin * width, in<T>(weight), out<T>(result.y) + begin * width,
                    out<float>(result.rstd) + begin, end - begin, width, static_cast<float>(eps));
    });
  });
  return result;
}

struct RmsNormGradients {
  Tensor x;
  Tensor weight;
};

RmsNormGradients rms_norm_gradients(const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                    const Tensor& dy) {
  const int64_t width = weight.numel(), rows = x.numel() / width;
  const int64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  Tensor dx = at::empty_like(x), partial = at::zeros({tasks, width}, rstd.options());
  for_cpu_type(x, [&](auto tag) {
    using T = decltype(tag);
    at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t row = task * kRowsPerTask, at = row * width;
        rms_norm_rows_backward(in<T>(x) + at, in<T>(weight), in<float>(rstd) + row, in<T>(dy) + at,
                               out<T>(dx) + at, out<float>(partial) + task * width,
                               std::min(kRowsPerTask, rows - row), width);
      }
    });
  });
  return {dx, partial.sum(0).to(weight.scalar_type())};
}

class RmsNormFunction : public torch::autograd::Function<RmsNormFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        double eps) {
    const Tensor x = input.contiguous();
    const Normed normed = rms_norm_forward(x, weight, eps);
    ctx->save_for_backward({x, weight, normed.rstd});
    return normed.y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const RmsNormGradients d =
        rms_norm_gradients(saved[0], saved[1], saved[2], grads[0].contiguous());
    return {d.x, d.weight, Tensor()};
  }
};

/// input [N, in]; the layers; the norm's weight, then their parameters.
class NormLinears : public torch::autograd::Function<NormLinears> {
  static constexpr size_t kNormWeight = 3;  // its place among the arguments of forward

 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& input, double eps,
                               const std::shared_ptr<const lora::LinearGroup>& layers,
                               at::TensorList parameters) {
    const Tensor x = input.contiguous();
    const Tensor y = rms_norm_forward(x, parameters[0], eps).y;
    lora::LinearGroup::Outputs outputs = layers->forward(y, y);
    variable_list saved = {x, parameters[0]};
    saved.insert(saved.end(), outputs.t.begin(), outputs.t.end());
    lora::save_with_group(*ctx, std::move(saved), layers);
    ctx->saved_data["eps"] = eps;
    return std::move(outputs.y);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &norm_weight = saved[1];
    const Normed normed = rms_norm_forward(x, norm_weight, ctx->saved_data["eps"].toDouble());
    const bool with_input = ctx->needs_input_grad(0) || norm_weight.requires_grad();
    const auto t = saved.begin() + 2;
    const lora::LinearGroup::Gradients layers = lora::saved_group(*ctx)->backward(
        grads, normed.y, {t, t + static_cast<std::ptrdiff_t>(grads.size())}, {.x = with_input});
    variable_list results(kNormWeight + 1);
    results.insert(results.end(), layers.parameters.begin(), layers.parameters.end());
    if (!with_input) return results;
    const RmsNormGradients d = rms_norm_gradients(x, norm_weight, normed.rstd, layers.x);
    results[0] = d.x;
    results[kNormWeight] = d.weight;
    return results;
  }
};

Tensor swiglu_forward(const Tensor& gate, const Tensor& up) {
  Tensor y = at::empty_like(gate);
  for_cpu_type(gate, [&](auto tag) {
    using T = decltype(tag);
    at::parallel_for(0, gate.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      swiglu(in<T>(gate) + begin, in<T>(up) + begin, out<T>(y) + begin, end - begin);
    });
  });
  return y;
}

struct SwigluGradients {
  Tensor gate;
  Tensor up;
};

SwigluGradients swiglu_gradients(const Tensor& gate, const Tensor& up, const Tensor& dy) {
  SwigluGradients d{at::empty_like(gate), at::empty_like(up)};
  for_cpu_type(gate, [&](auto tag) {
    using T = decltype(tag);
    at::parallel_for(0, gate.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      swiglu_backward(in<T>(gate) + begin, in<T>(up) + begin, in<T>(dy) + begin,
                      out<T>(d.gate) + begin, out<T>(d.up) + begin, end - begin);
    });
  });
  return d;
}

class SwigluFunction : public torch::autograd::Function<SwigluFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_in, const Tensor& up_in) {
    const Tensor gate = gate_in.contiguous(), up = up_in.contiguous();
    ctx->save_for_backward({gate, up});
    return swiglu_forward(gate, up);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    SwigluGradients d = swiglu_gradients(saved[0], saved[1], grads[0].contiguous());
    return {d.gate, d.up};
  }
};

/// gate, up [N, in]; one layer, and its parameters.
class SwigluLinear : public torch::autograd::Function<SwigluLinear> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_in, const Tensor& up_in,
                        const std::shared_ptr<const lora::LinearGroup>& layer, at::TensorList) {
    const Tensor gate = gate_in.contiguous(), up = up_in.contiguous();
    const Tensor x = swiglu_forward(gate, up);
    lora::LinearGroup::Outputs outputs = layer->forward(x, x);
    lora::save_with_group(*ctx, {gate, up, outputs.t[0]}, layer);
    return outputs.y[0];
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &gate = saved[0], &up = saved[1];
    const auto layer = lora::saved_group(*ctx);
    Tensor x = layer->reads_input() ? swiglu_forward(gate, up) : Tensor();
    const lora::LinearGroup::Gradients linear = layer->backward(grads, x, {saved[2]}, {});
    x.reset();
    SwigluGradients d = swiglu_gradients(gate, up, linear.x);
    variable_list results = {d.gate, d.up, Tensor()};
    results.insert(results.end(), linear.parameters.begin(), linear.parameters.end());
    return results;
  }
};

/// The layers as a group, if the CPU's fused loops take x and all of them are plain; else null.
std::shared_ptr<const lora::LinearGroup> fusable(const Tensor& x,
                                                 const std::vector<Tensor>& weights,
                                                 const std::vector<Tensor>& biases) {
  if (!on_fused_cpu(x) || x.dim() != 2) return nullptr;
  std::vector<lora::PlainLinear> layers;
  for (size_t i = 0; i < weights.size(); ++i) {
    auto plain = lora::plain_linear(weights[i], biases.empty() ? Tensor() : biases[i]);
    if (!plain) return nullptr;
    layers.push_back(std::move(*plain));
  }
  return std::make_shared<const lora::LinearGroup>(std::move(layers));
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  if (on_fused_cpu(x)) return RmsNormFunction::apply(x, weight, eps);
  const at::ScalarType wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor wide_x = x.to(wide);
  return (wide_x * (wide_x.square().mean(-1, true) + eps).rsqrt()).to(x.scalar_type()) * weight;
}

std::vector<Tensor> norm_linears(const Tensor& x, const Tensor& norm_weight, double eps,
                                 const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& biases) {
  check(biases.empty() || biases.size() == weights.size(), "norm_linears: a bias for some layers");
  if (const auto layers = fusable(x, weights, biases)) {
    std::vector<Tensor> parameters = layers->parameters();
    parameters.insert(parameters.begin(), norm_weight);
    return NormLinears::apply(x, eps, layers, at::TensorList(parameters));
  }
  const Tensor y = rms_norm(x, norm_weight, eps);
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i)
    results.push_back(fsdp::linear(y, weights[i], biases.empty() ? Tensor() : biases[i]));
  return results;
}

Tensor swiglu_linear(const Tensor& gate, const Tensor& up, const Tensor& weight,
                     const Tensor& bias) {
  if (const auto layer = fusable(gate, {weight}, {bias}))
    return SwigluLinear::apply(gate, up, layer, at::TensorList(layer->parameters()));
  return fsdp::linear(swiglu(gate, up), weight, bias);
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  if (on_fused_cpu(gate)) return SwigluFunction::apply(gate, up);
  return at::silu(gate) * up;
}

}  // namespace fsdp::models
