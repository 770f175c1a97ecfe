#include "libfsdp/models/functions.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "libfsdp/models/cpu_data.h"
#include "libfsdp/models/cpu_loops.h"
#include "libfsdp/shard/functions.h"
#include "libfsdp/shard/gradient_sink.h"

namespace fsdp::models {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kRowsPerTask = 64;  // fixed, so that sums do not depend on the number of threads
constexpr int64_t kElementsPerTask = 1 << 15;

class RmsNormFunction : public torch::autograd::Function<RmsNormFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        double eps) {
    const Tensor x = input.contiguous();
    const int64_t width = weight.numel(), rows = x.numel() / width;
    Tensor y = at::empty_like(x), rstd = at::empty({rows}, x.options().dtype(at::kFloat));
    for_cpu_type(x, [&](auto tag) {
      using T = decltype(tag);
      at::parallel_for(0, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
        rms_norm_rows(in<T>(x) + begin * width, in<T>(weight), out<T>(y) + begin * width,
                      out<float>(rstd) + begin, end - begin, width, static_cast<float>(eps));
      });
    });
    ctx->save_for_backward({x, weight, rstd});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2], dy = grads[0].contiguous();
    const int64_t width = weight.numel(), rows = x.numel() / width;
    const int64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
    Tensor dx = at::empty_like(x), partial = at::zeros({tasks, width}, rstd.options());
    for_cpu_type(x, [&](auto tag) {
      using T = decltype(tag);
      at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
          const int64_t row = task * kRowsPerTask, at = row * width;
          rms_norm_rows_backward(
              in<T>(x) + at, in<T>(weight), in<float>(rstd) + row, in<T>(dy) + at, out<T>(dx) + at,
              out<float>(partial) + task * width, std::min(kRowsPerTask, rows - row), width);
        }
      });
    });
    return {dx, partial.sum(0).to(weight.scalar_type()), Tensor()};
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

Tensor swiglu_linear(const Tensor& gate, const Tensor& up, const Tensor& weight,
                     const Tensor& bias) {
  if (!on_fused_cpu(gate) || gate.dim() != 2) return fsdp::linear(swiglu(gate, up), weight, bias);
  return SwigluLinear::apply(gate, up, weight,
                             bias.defined() ? std::optional<Tensor>(bias) : std::nullopt);
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  if (on_fused_cpu(gate)) return SwigluFunction::apply(gate, up);
  return at::silu(gate) * up;
}

}  // namespace fsdp::models
