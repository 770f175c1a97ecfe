// The CUDA kernels behind the boundary of libfsdp_cuda.so, as a table of C functions. C++17, no
// CUDA headers.
//
// Each is the twin of a CPU function with the same body (element_math.h) and gives the same bits.
// All pointers are device memory unless said otherwise; `stream` is a cudaStream_t; the call
// enqueues, allocates nothing and returns CUDA's error number.
#pragma once

#include <cstdint>

#include "libfsdp/kernels/any_precision.h"
#include "libfsdp/kernels/element_math.h"
#include "libfsdp/kernels/four_bit.h"
#include "libfsdp/kernels/parameter_forms.h"
#include "libfsdp/kernels/quantized_state.h"

namespace fsdp::kernels {

/// Raised whenever the table's layout changes.
constexpr int32_t kCudaKernelTableVersion = 6;

enum class FoldType : int32_t { kF32, kBf16, kF16 };

struct CudaKernelTable {
  int32_t version;
  int (*split_master)(const float* master, uint16_t* high, uint16_t* remainder, int64_t n,
                      void* stream);
  int (*join_master)(const uint16_t* high, const uint16_t* remainder, float* master, int64_t n,
                     void* stream);
  /// As fold_ranks(); `sources` is a host array of `count` device pointers, read before the call
  /// returns.
  int (*fold_ranks)(float* destination, const void* const* sources, int count, FoldType type,
                    int64_t n, int accumulate, void* stream);
  /// As Compute::convert() and Compute::scale().
  int (*convert)(const float* from, void* to, FoldType type, int64_t n, void* stream);
  int (*scale)(float* values, int64_t n, float factor, float limit, void* stream);
  /// As quantum_sums(), but *non_finite is added to.
  int (*quantum_sums)(const float* values, int64_t n, NormType type, double* sums,
                      int64_t* non_finite, void* stream);
  /// As add_gradient_sums() on kExactSumLimbs limbs and a magnitude, which may be zeroed memory or
  /// hold earlier sums; the one that `type` does not use may be null.
  int (*add_gradient_sums)(const float* values, int64_t n, NormType type, int64_t* limbs,
                           float* max_abs, int64_t* non_finite, void* stream);
  // As the functions of update.h; the structs are host memory, read before the call returns.
  int (*adamw)(const ParameterArrays* parameter, const float* gradient, float* exp_avg,
               float* exp_avg_sq, int64_t n, const AdamWScalars* scalars, void* stream);
  int (*sgd)(const ParameterArrays* parameter, const float* gradient, float* buffer, int64_t n,
             int nesterov, const SgdScalars* scalars, void* stream);
  int (*any_precision_adamw)(const AnyPrecisionArrays* arrays, int64_t n,
                             const AnyPrecisionScalars* scalars, void* stream);
  int (*adamw_8bit)(const ParameterArrays* parameter, const float* gradient,
                    const QuantizedState* state, int64_t n, const AdamWScalars* scalars,
                    void* stream);
  // As the functions of quantized_weight.h.
  int (*quantize_4bit)(const void* values, FoldType type, int64_t numel, FourBitCode code,
                       int64_t blocksize, uint8_t* packed, float* absmax, void* stream);
  int (*dequantize_4bit)(const uint8_t* packed, const float* absmax, int64_t numel,
                         FourBitCode code, int64_t blocksize, void* values, FoldType type,
                         void* stream);
  int (*dequantize_absmax)(const uint8_t* codes, const float* nested_absmax, float offset,
                           int64_t skip, int64_t n, float* absmax, void* stream);
  int (*quantize_int8)(const void* values, FoldType type, int64_t rows, int64_t columns,
                       int8_t* codes, float* absmax, void* stream);
  int (*dequantize_int8)(const int8_t* codes, const float* absmax, int64_t columns, int64_t skip,
                         int64_t numel, void* values, FoldType type, void* stream);
};

/// Name of the exported function of type `const CudaKernelTable* ()`.
constexpr const char* kCudaKernelTableSymbol = "fsdp_cuda_kernel_table";

/// The table of the loaded libfsdp_cuda.so. Throws ConfigError when it cannot be opened.
const CudaKernelTable& cuda_kernels();

}  // namespace fsdp::kernels
