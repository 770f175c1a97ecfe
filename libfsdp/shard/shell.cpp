#include "libfsdp/shard/shell.h"

#include <ATen/ATen.h>
#include <dlfcn.h>

#include "libfsdp/base/error.h"

namespace fsdp {

at::ScalarType to_scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return at::kDouble;
    case DType::kF32:
      return at::kFloat;
    case DType::kF16:
      return at::kHalf;
    case DType::kBF16:
      return at::kBFloat16;
    case DType::kI64:
      return at::kLong;
    case DType::kI32:
      return at::kInt;
    case DType::kI16:
      return at::kShort;
    case DType::kI8:
      return at::kChar;
    case DType::kU8:
      return at::kByte;
    case DType::kBool:
      return at::kBool;
  }
  throw InternalError("unknown dtype");
}

DType to_dtype(at::ScalarType type) {
  for (const DType dtype : {DType::kF64, DType::kF32, DType::kF16, DType::kBF16, DType::kI64,
                            DType::kI32, DType::kI16, DType::kI8, DType::kU8, DType::kBool}) {
    if (to_scalar_type(dtype) == type) return dtype;
  }
  throw ConfigError(cat("tensors of type ", c10::toString(type), " are not supported"));
}

at::Device device_of(const kernels::Compute& compute) {
  if (compute.device() < 0) return at::kCPU;
  static void* const opened = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL);
  if (opened == nullptr) {
    const char* why = dlerror();
    throw ConfigError(cat("LibTorch's CUDA part could not be opened",
                          why != nullptr ? cat(": ", why) : "",
                          ". Hint: it is in the wheels of PyTorch for CUDA"));
  }
  return {at::kCUDA, static_cast<at::DeviceIndex>(compute.device())};
}

at::Tensor view_memory(void* memory, at::IntArrayRef shape, at::ScalarType type,
                       at::Device device) {
  // With the device as target nobody asks the driver about the address.
  return at::for_blob(memory, shape)
      .options(at::TensorOptions(type).device(device))
      .target_device(device)
      .make_tensor();
}

at::Tensor make_shell(at::IntArrayRef shape, at::ScalarType type, const std::string& message,
                      at::Device device) {
  const auto bytes = static_cast<size_t>(c10::multiply_integers(shape)) * c10::elementSize(type);
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, at::DataPtr(nullptr, device), nullptr, false);
  storage->release_data_and_set_meta_custom_data_ptr_error_msg_(message);
  const c10::DispatchKey key = device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  at::Tensor shell = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(storage)), c10::DispatchKeySet(key), c10::scalarTypeToTypeMeta(type));
  shell.unsafeGetTensorImpl()->set_sizes_contiguous(shape);
  return shell;
}

void replace_data(const at::Tensor& tensor, const at::Tensor& data) {
  tensor.unsafeGetTensorImpl()->shallow_copy_from(data.getIntrusivePtr());
}

}  // namespace fsdp
