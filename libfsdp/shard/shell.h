// Tensors that stand for a parameter while it is not gathered.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "libfsdp/base/dtype.h"

namespace fsdp {

at::ScalarType to_scalar_type(DType dtype);
/// Throws ConfigError for types that libfsdp does not know.
DType to_dtype(at::ScalarType type);

/// A tensor of full shape without memory: every operation on its data throws `message`.
at::Tensor make_shell(at::IntArrayRef shape, at::ScalarType type, const std::string& message);

/// Gives `tensor` (which may be on meta) the data of `data`, keeping its identity: every handle
/// sees it. Only before the tensor has taken part in a graph.
void replace_data(const at::Tensor& tensor, const at::Tensor& data);

}  // namespace fsdp
