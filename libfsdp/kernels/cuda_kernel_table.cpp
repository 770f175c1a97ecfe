#include "libfsdp/kernels/cuda_kernel_table.h"

#include "libfsdp/base/error.h"
#include "libfsdp/device/cuda_loader.h"
#include "libfsdp/kernels/fold_type.h"

namespace fsdp::kernels {

const CudaKernelTable& cuda_kernels() {
  using GetTable = const CudaKernelTable* (*)();
  static const CudaKernelTable* const table =
      reinterpret_cast<GetTable>(device::cuda_symbol(kCudaKernelTableSymbol))();
  check(table->version == kCudaKernelTableVersion,
        "libfsdp_cuda.so has kernels of another version");
  return *table;
}

FoldType fold_type(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return FoldType::kF32;
    case DType::kBF16:
      return FoldType::kBf16;
    case DType::kF16:
      return FoldType::kF16;
    default:
      throw InternalError(
          cat("cuda: ", dtype_name(dtype), "; expected float32, bfloat16 or float16"));
  }
}

}  // namespace fsdp::kernels
