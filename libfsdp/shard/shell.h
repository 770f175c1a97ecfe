// Tensors that stand for a parameter while it is not gathered.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "libfsdp/base/dtype.h"
#include "libfsdp/kernels/compute.h"

namespace fsdp {

at::ScalarType to_scalar_type(DType dtype);
/// Throws ConfigError for types that libfsdp does not know.
DType to_dtype(at::ScalarType type);

/// Where tensors over `compute`'s memory are. Opens LibTorch's CUDA part where that is a CUDA
/// device: programs link the CPU's only. Throws ConfigError when it is not there.
at::Device device_of(const kernels::Compute& compute);

/// A contiguous tensor over memory that is somebody else's.
at::Tensor view_memory(void* memory, at::IntArrayRef shape, at::ScalarType type, at::Device device);

/// A tensor of full shape without memory: every operation on its data throws `message`.
at::Tensor make_shell(at::IntArrayRef shape, at::ScalarType type, const std::string& message,
                      at::Device device = at::kCPU);

/// Gives `tensor` (which may be on meta) the data of `data`, keeping its identity: every handle
/// sees it. Only before the tensor has taken part in a graph.
void replace_data(const at::Tensor& tensor, const at::Tensor& data);

}  // namespace fsdp
