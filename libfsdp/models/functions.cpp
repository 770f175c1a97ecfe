#include "libfsdp/models/functions.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>

#include "libfsdp/base/error.h"
#include "libfsdp/models/cpu_data.h"
#include "libfsdp/models/cpu_loops.h"
#include "libfsdp/shard/functions.h"
#include "libfsdp/shard/gradient_sink.h"
#include "libfsdp/shard/weight_adapter.h"

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

/// input [N, in]. Parameters: the norm's weight, then all linear layers' weights, then their biases
/// or none.
class NormLinears : public torch::autograd::Function<NormLinears> {
  static constexpr size_t kNormWeight = 3;  // its place among the arguments of forward

 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& input, double eps,
                               int64_t num_layers, at::TensorList parameters) {
    const Tensor x = input.contiguous();
    const size_t n = static_cast<size_t>(num_layers);
    const bool biased = parameters.size() > n + 1;
    const Tensor y = rms_norm_forward(x, parameters[0], eps).y;
    variable_list results, saved{x};
    for (size_t i = 1; i <= n; ++i) {
      results.push_back(at::linear(
          y, parameters[i], biased ? std::optional<Tensor>(parameters[i + n]) : std::nullopt));
    }
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["eps"] = eps;
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &norm_weight = saved[1];
    const Normed normed = rms_norm_forward(x, norm_weight, ctx->saved_data["eps"].toDouble());
    const size_t n = grads.size();
    variable_list results(kNormWeight + saved.size() - 1);
    Tensor* const d_weights = &results[kNormWeight + 1];
    for (size_t i = 0; i < n; ++i) {
      if (const Tensor& weight = saved[2 + i]; weight.requires_grad())
        d_weights[i] = linear_weight_gradient(weight, grads[i], normed.y);
      if (const size_t bias = 2 + n + i; bias < saved.size() && saved[bias].requires_grad())
        d_weights[n + i] = linear_bias_gradient(saved[bias], grads[i]);
    }
    if (!ctx->needs_input_grad(0) && !norm_weight.requires_grad()) return results;
    Tensor dy = at::mm(grads[0], saved[2]);
    for (size_t i = 1; i < n; ++i) at::addmm_out(dy, dy, grads[i], saved[2 + i]);
    const RmsNormGradients d = rms_norm_gradients(x, norm_weight, normed.rstd, dy);
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

/// gate, up [N, in].
class SwigluLinear : public torch::autograd::Function<SwigluLinear> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_in, const Tensor& up_in,
                        const Tensor& weight, const std::optional<Tensor>& bias) {
    const Tensor gate = gate_in.contiguous(), up = up_in.contiguous();
    ctx->save_for_backward({gate, up, weight, bias.value_or(Tensor())});
    return at::linear(swiglu_forward(gate, up), weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &gate = saved[0], &up = saved[1], &weight = saved[2], &bias = saved[3];
    const Tensor& dy = grads[0];
    Tensor d_weight, d_bias;
    if (ctx->needs_input_grad(2))
      d_weight = linear_weight_gradient(weight, dy, swiglu_forward(gate, up));
    if (bias.defined() && bias.requires_grad()) d_bias = linear_bias_gradient(bias, dy);
    SwigluGradients d = swiglu_gradients(gate, up, at::mm(dy, weight));
    return {d.gate, d.up, d_weight, d_bias};
  }
};

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
  const bool adapted = std::any_of(weights.begin(), weights.end(), weight_adapter);
  if (!on_fused_cpu(x) || x.dim() != 2 || adapted) {
    const Tensor y = rms_norm(x, norm_weight, eps);
    std::vector<Tensor> results;
    for (size_t i = 0; i < weights.size(); ++i)
      results.push_back(fsdp::linear(y, weights[i], biases.empty() ? Tensor() : biases[i]));
    return results;
  }
  std::vector<Tensor> parameters{norm_weight};
  parameters.insert(parameters.end(), weights.begin(), weights.end());
  parameters.insert(parameters.end(), biases.begin(), biases.end());
  return NormLinears::apply(x, eps, static_cast<int64_t>(weights.size()),
                            at::TensorList(parameters));
}

Tensor swiglu_linear(const Tensor& gate, const Tensor& up, const Tensor& weight,
                     const Tensor& bias) {
  if (!on_fused_cpu(gate) || gate.dim() != 2 || weight_adapter(weight))
    return fsdp::linear(swiglu(gate, up), weight, bias);
  return SwigluLinear::apply(gate, up, weight,
                             bias.defined() ? std::optional<Tensor>(bias) : std::nullopt);
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  if (on_fused_cpu(gate)) return SwigluFunction::apply(gate, up);
  return at::silu(gate) * up;
}

}  // namespace fsdp::models
