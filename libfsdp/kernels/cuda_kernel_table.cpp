#include "libfsdp/kernels/cuda_kernel_table.h"

#include "libfsdp/base/error.h"
#include "libfsdp/device/cuda_loader.h"

namespace fsdp::kernels {

const CudaKernelTable& cuda_kernels() {
  using GetTable = const CudaKernelTable* (*)();
  static const CudaKernelTable* const table =
      reinterpret_cast<GetTable>(device::cuda_symbol(kCudaKernelTableSymbol))();
  check(table->version == kCudaKernelTableVersion,
        "libfsdp_cuda.so has kernels of another version");
  return *table;
}

}  // namespace fsdp::kernels
