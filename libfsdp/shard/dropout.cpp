#include "libfsdp/shard/dropout.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <torch/csrc/autograd/custom_function.h>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/dropout_loop.h"
#include "libfsdp/shard/random.h"
#include "libfsdp/shard/shell.h"

namespace fsdp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kParallelNumel = int64_t{1} << 15;  // Elements worth a task of the thread pool.

bool has_loop(const at::Tensor& x) {
  return x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 ||
                        x.scalar_type() == at::kHalf);
}

at::Tensor masked_by_loop(const at::Tensor& x, double p, uint64_t key) {
  const at::Tensor from = x.contiguous();
  at::Tensor to = at::empty_like(from, at::MemoryFormat::Contiguous);
  const DType dtype = to_dtype(from.scalar_type());
  const auto bytes = static_cast<int64_t>(dtype_bytes(dtype));
  const auto* source = static_cast<const std::byte*>(from.const_data_ptr());
  auto* target = static_cast<std::byte*>(to.mutable_data_ptr());
  at::parallel_for(0, from.numel(), kParallelNumel, [&](int64_t begin, int64_t end) {
    apply_dropout(source + begin * bytes, target + begin * bytes, dtype, begin, end - begin, key,
                  p);
  });
  return to;
}

// For the types and devices without a loop: the same mask, as a tensor.
at::Tensor masked_by_product(const at::Tensor& x, double p, uint64_t key) {
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor ones = at::ones(x.sizes(), at::TensorOptions(at::kFloat));
  const at::Tensor kept = masked_by_loop(ones, p, key).ne(0).to(x.device()).to(wide);
  const double scale = p < 1 ? 1 / (1 - p) : 0;
  return x.contiguous().to(wide).mul(kept.mul(scale)).to(x.scalar_type());
}

struct DropoutFunction : torch::autograd::Function<DropoutFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, double p, int64_t key) {
    context->saved_data["p"] = p;
    context->saved_data["key"] = key;
    const auto bits = static_cast<uint64_t>(key);
    return has_loop(x) ? masked_by_loop(x, p, bits) : masked_by_product(x, p, bits);
  }
  // Linear in x: the gradient goes through the same mask.
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    return {DropoutFunction::apply(gradients[0], context->saved_data["p"].toDouble(),
                                   context->saved_data["key"].toInt()),
            at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor dropout(const at::Tensor& x, double p, bool training) {
  if (!(p >= 0 && p <= 1)) throw ConfigError(cat("dropout: p = ", p, "; expected 0 to 1"));
  if (!at::isFloatingType(x.scalar_type())) {
    throw ConfigError(
        cat("dropout: ", c10::toString(x.scalar_type()), " tensor; expected a floating type"));
  }
  if (!training || p == 0) return x;
  return DropoutFunction::apply(x, p, static_cast<int64_t>(RandomScope::next_key()));
}

DropoutImpl::DropoutImpl(const torch::nn::DropoutOptions& options_) : options(options_) {
  DropoutImpl::reset();
}

void DropoutImpl::reset() {
  if (!(options.p() >= 0 && options.p() <= 1))
    throw ConfigError(cat("fsdp::Dropout: p = ", options.p(), "; expected 0 to 1"));
  if (options.inplace()) {
    throw ConfigError(
        "fsdp::Dropout: inplace is not supported. Hint: leave it out; no mask is "
        "saved, so it would save nothing.");
  }
}

void DropoutImpl::pretty_print(std::ostream& stream) const {
  stream << "fsdp::Dropout(p=" << options.p() << ")";
}

}  // namespace fsdp
