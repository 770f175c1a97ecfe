// The table of CUDA kernels that libfsdp_cuda.so exports.
#include "libfsdp/kernels/cuda_launchers.h"

namespace fsdp::kernels {
namespace {

const CudaKernelTable kTable = {
    kCudaKernelTableVersion,
    launch_split,
    launch_join,
    launch_fold,
    launch_convert,
    launch_scale,
    launch_quantum_sums,
    launch_gradient_sums,
    launch_adamw,
    launch_sgd,
    launch_any_precision_adamw,
    launch_adamw_8bit,
    launch_quantize_4bit,
    launch_dequantize_4bit,
    launch_dequantize_absmax,
    launch_quantize_int8,
    launch_dequantize_int8,
};

}  // namespace
}  // namespace fsdp::kernels

extern "C" __attribute__((visibility("default"))) const fsdp::kernels::CudaKernelTable*
fsdp_cuda_kernel_table() {
  return &fsdp::kernels::kTable;
}
