// Tensors that the scripts of the truths wrote.
#pragma once

#include <ATen/ATen.h>

#include <string>

#include "libfsdp/base/error.h"
#include "libfsdp/io/safetensors.h"

namespace fsdp::testing {

/// fp32, fp64 or int64.
inline at::Tensor read(const io::SafetensorsFile& file, const std::string& name) {
  const io::TensorEntry* entry = file.find(name);
  if (!entry) throw ModelError("no tensor " + name);
  const auto type = entry->dtype == DType::kI64   ? at::kLong
                    : entry->dtype == DType::kF64 ? at::kDouble
                                                  : at::kFloat;
  at::Tensor tensor = at::empty(entry->shape, at::TensorOptions(type));
  file.read(*entry, 0,
            {static_cast<std::byte*>(tensor.data_ptr()), static_cast<size_t>(tensor.nbytes())});
  return tensor;
}

}  // namespace fsdp::testing
