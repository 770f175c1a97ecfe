#include "libfsdp/shard/adapted_operations.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "libfsdp/shard/weight_adapter.h"

namespace fsdp {
namespace {

using at::Tensor;
using Ints = at::IntArrayRef;
using MaybeTensor = std::optional<Tensor>;

constexpr auto kKey = c10::DispatchKey::TESTING_ONLY_GenericWrapper;
constexpr c10::DispatchKeySet kKeySet{kKey};

/// A way to the keys of a tensor, which only derived classes may name.
struct KeysOf : c10::TensorImpl {
  static c10::DispatchKeySet& of(const Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->*(&KeysOf::key_set_);
  }
};

bool is_adapted(const Tensor& tensor) { return tensor.defined() && tensor.key_set().has(kKey); }

/// The weight's data as a tensor that no operation asks for: autograd may keep it, it reads the
/// same address in backward.
Tensor data_of(const Tensor& weight) {
  Tensor data = weight.variable_data();
  KeysOf::of(data) = data.key_set().remove(kKey);
  return data;
}

/// On the transpose of a weight: which weight's.
class TransposeHook : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit TransposeHook(Tensor of) : weight(std::move(of)) {}
  void operator()(const torch::autograd::Variable&) override {}
  Tensor weight;
};

/// Undefined when `tensor` is no transpose of a weight with an adapter.
Tensor transposed_weight(const Tensor& tensor) {
  if (!is_adapted(tensor)) return {};
  const auto* meta = torch::autograd::impl::get_autograd_meta(tensor);
  if (!meta || !meta->post_acc_grad_hooks_) return {};
  const auto* hook = dynamic_cast<const TransposeHook*>(meta->post_acc_grad_hooks_.get());
  return hook ? hook->weight : Tensor();
}

/// What an operation without a form of its own reads.
Tensor as_read(const Tensor& tensor, const char* operation) {
  if (!is_adapted(tensor)) return tensor;
  if (WeightAdapter* adapter = weight_adapter(tensor))
    return adapter->matrix(data_of(tensor), operation);
  if (const Tensor weight = transposed_weight(tensor); weight.defined())
    return as_read(weight, operation).t();
  return data_of(tensor);
}

MaybeTensor as_read(const MaybeTensor& tensor, const char* operation) {
  return tensor ? MaybeTensor(as_read(*tensor, operation)) : tensor;
}

Tensor or_undefined(const MaybeTensor& tensor) { return tensor.value_or(Tensor()); }

// ---------------------------------------------------------------------------------------------------------------------
// What LibTorch's layers call

Tensor transpose(const Tensor& self) {
  if (!weight_adapter(self)) return as_read(self, "t").t();
  Tensor transposed = data_of(self).t();
  torch::autograd::impl::set_post_acc_grad_hooks(transposed, std::make_unique<TransposeHook>(self));
  adapt_operations(transposed);
  return transposed;
}

Tensor linear(const Tensor& input, const Tensor& weight, const MaybeTensor& bias) {
  if (WeightAdapter* adapter = weight_adapter(weight))
    return adapter->linear(input, data_of(weight), or_undefined(bias));
  return at::linear(as_read(input, "linear"), as_read(weight, "linear"), as_read(bias, "linear"));
}

Tensor matmul(const Tensor& self, const Tensor& other) {
  if (const Tensor weight = transposed_weight(other); weight.defined() && !is_adapted(self))
    return weight_adapter(weight)->linear(self, data_of(weight), {});
  return at::matmul(as_read(self, "matmul"), as_read(other, "matmul"));
}

Tensor addmm(const Tensor& self, const Tensor& mat1, const Tensor& mat2, const at::Scalar& beta,
             const at::Scalar& alpha) {
  const bool is_bias = self.dim() == 1 && beta.toDouble() == 1 && alpha.toDouble() == 1;
  if (const Tensor weight = transposed_weight(mat2);
      weight.defined() && is_bias && !is_adapted(mat1))
    return weight_adapter(weight)->linear(mat1, data_of(weight), self);
  return at::addmm(as_read(self, "addmm"), as_read(mat1, "addmm"), as_read(mat2, "addmm"), beta,
                   alpha);
}

Tensor embedding(const Tensor& weight, const Tensor& ids, int64_t padding_idx,
                 bool scale_grad_by_freq, bool sparse) {
  WeightAdapter* adapter = weight_adapter(weight);
  if (!adapter) {
    return at::embedding(as_read(weight, "embedding"), ids, padding_idx, scale_grad_by_freq,
                         sparse);
  }
  const Tensor rows =
      adapter->embedding(data_of(weight), ids.reshape({-1}), padding_idx, scale_grad_by_freq);
  std::vector<int64_t> shape = ids.sizes().vec();
  shape.push_back(rows.size(1));
  return rows.view(shape);
}

template <class Convolve>
Tensor convolve(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, int64_t groups,
                Convolve convolution) {
  if (WeightAdapter* adapter = weight_adapter(weight))
    return adapter->convolve(input, data_of(weight), or_undefined(bias), groups, convolution);
  return convolution(as_read(input, "convolution"), as_read(weight, "convolution"),
                     or_undefined(as_read(bias, "convolution")), groups);
}

template <class Padding>
Tensor conv1d(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, Ints stride,
              Padding padding, Ints dilation, int64_t groups) {
  return convolve(input, weight, bias, groups,
                  [&](const Tensor& x, const Tensor& w, const Tensor& b, int64_t n) {
                    return at::conv1d(x, w, b, stride, padding, dilation, n);
                  });
}

template <class Padding>
Tensor conv2d(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, Ints stride,
              Padding padding, Ints dilation, int64_t groups) {
  return convolve(input, weight, bias, groups,
                  [&](const Tensor& x, const Tensor& w, const Tensor& b, int64_t n) {
                    return at::conv2d(x, w, b, stride, padding, dilation, n);
                  });
}

template <class Padding>
Tensor conv3d(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, Ints stride,
              Padding padding, Ints dilation, int64_t groups) {
  return convolve(input, weight, bias, groups,
                  [&](const Tensor& x, const Tensor& w, const Tensor& b, int64_t n) {
                    return at::conv3d(x, w, b, stride, padding, dilation, n);
                  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Everything else

/// Operations that move values, or ask what is no value: they mean the weight itself.
bool means_itself(std::string_view operation) {
  for (const char* name : {"_to_copy",      "_version",
                           "alias",         "clone",
                           "contiguous",    "copy_",
                           "cpu",           "cuda",
                           "data",          "detach",
                           "detach_",       "is_leaf",
                           "is_pinned",     "is_same_size",
                           "lift_fresh",    "output_nr",
                           "record_stream", "retain_grad",
                           "retains_grad",  "set_",
                           "set_data",      "size",
                           "stride",        "sym_numel",
                           "sym_size",      "sym_storage_offset",
                           "sym_stride",    "to"}) {
    if (operation == name) return true;
  }
  return false;
}

void replace_by_what_is_read(c10::IValue& argument, const char* operation) {
  if (argument.isTensor()) {
    argument = as_read(argument.toTensor(), operation);
  } else if (argument.isTensorList()) {
    auto list = argument.toTensorList().copy();
    for (size_t i = 0; i < list.size(); ++i) list.set(i, as_read(list.get(i), operation));
    argument = list;
  } else if (argument.isOptionalTensorList()) {
    auto list = argument.toOptionalTensorList().copy();
    for (size_t i = 0; i < list.size(); ++i) list.set(i, as_read(list.get(i), operation));
    argument = list;
  }
}

void any_other(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& arguments = operation.schema().arguments();
  const std::string& full_name = operation.schema().name();
  const std::string name = full_name.substr(full_name.rfind(':') + 1);
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size() && !means_itself(name); ++i) {
    const auto* alias = arguments[i].alias_info();
    const bool is_written = alias && alias->isWrite();
    if (!is_written) replace_by_what_is_read((*stack)[first + i], name.c_str());
  }
  const c10::impl::ExcludeDispatchKeyGuard as_they_are(kKeySet);
  operation.callBoxed(stack);
}

class Registration {
 public:
  Registration()
      : others_(torch::Library::IMPL, "_", kKey, __FILE__, __LINE__),
        operations_(torch::Library::IMPL, "aten", kKey, __FILE__, __LINE__) {
    others_.fallback(torch::CppFunction::makeFromBoxedFunction<&any_other>());
    // Of set_data().
    operations_.impl("_has_compatible_shallow_copy_type", torch::CppFunction::makeFallthrough());
    operations_.impl("t", TORCH_FN(transpose));
    operations_.impl("linear", TORCH_FN(linear));
    operations_.impl("matmul", TORCH_FN(matmul));
    operations_.impl("addmm", TORCH_FN(addmm));
    operations_.impl("embedding", TORCH_FN(embedding));
    operations_.impl("conv1d", TORCH_FN(conv1d<Ints>));
    operations_.impl("conv2d", TORCH_FN(conv2d<Ints>));
    operations_.impl("conv3d", TORCH_FN(conv3d<Ints>));
    operations_.impl("conv1d.padding", TORCH_FN(conv1d<c10::string_view>));
    operations_.impl("conv2d.padding", TORCH_FN(conv2d<c10::string_view>));
    operations_.impl("conv3d.padding", TORCH_FN(conv3d<c10::string_view>));
  }

 private:
  torch::Library others_, operations_;
};

}  // namespace

void adapt_operations(const Tensor& weight) {
  static const Registration registered;
  KeysOf::of(weight) = weight.key_set().add(kKey);
}

}  // namespace fsdp
