#include "libfsdp/models/fast_matmul.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/mm.h>

namespace fsdp::models {
namespace {

bool processor_gains() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

void set_precision(at::Float32Precision precision) {
  at::globalContext().setFloat32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL,
                                          precision);
}

/// Numbers with 24 significant bits times the identity come back whole, unless they are rounded on
/// the way; in each of the three layouts of a linear layer, at two sizes.
bool products_are_whole() {
  const at::NoGradGuard no_grad;
  for (const int64_t n : {64, 576}) {
    const at::Tensor x = at::linspace(1.0, 2.0, n * n, at::kFloat).view({n, n});
    const at::Tensor one = at::eye(n, at::kFloat);
    if (!at::mm(x, one).equal(x) || !at::mm(x, one.t()).equal(x) ||
        !at::mm(x.t(), one).equal(x.t())) {
      return false;
    }
    if (!at::mm(one, x).equal(x) || !at::mm(one, x.t()).equal(x.t())) return false;
  }
  return true;
}

}  // namespace

bool use_fast_float32_matmul() {
  if (!processor_gains()) return false;
  set_precision(at::Float32Precision::BF16);
  if (products_are_whole()) return true;
  set_precision(at::Float32Precision::IEEE);
  return false;
}

}  // namespace fsdp::models
