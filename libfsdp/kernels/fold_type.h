// How element types cross the boundary of libfsdp_cuda.so.
#pragma once

#include "libfsdp/base/dtype.h"
#include "libfsdp/kernels/cuda_kernel_table.h"

namespace fsdp::kernels {

/// Throws InternalError for a type that is not f32, bf16 or f16.
FoldType fold_type(DType dtype);

}  // namespace fsdp::kernels
