// The functions behind CudaKernelTable, by file; see there. C++17, no CUDA headers.
#pragma once

#include "libfsdp/kernels/cuda_kernel_table.h"

namespace fsdp::kernels {

// cuda_elements.cu
int launch_split(const float* master, uint16_t* high, uint16_t* remainder, int64_t n, void* stream);
int launch_join(const uint16_t* high, const uint16_t* remainder, float* master, int64_t n,
                void* stream);
int launch_fold(float* destination, const void* const* sources, int count, FoldType type, int64_t n,
                int accumulate, void* stream);
int launch_convert(const float* from, void* to, FoldType type, int64_t n, void* stream);
int launch_scale(float* values, int64_t n, float factor, float limit, void* stream);

// cuda_sums.cu
int launch_quantum_sums(const float* values, int64_t n, NormType type, double* sums,
                        int64_t* non_finite, void* stream);
int launch_gradient_sums(const float* values, int64_t n, NormType type, int64_t* limbs,
                         float* max_abs, int64_t* non_finite, void* stream);

// cuda_updates.cu
int launch_adamw(const ParameterArrays* parameter, const float* gradient, float* exp_avg,
                 float* exp_avg_sq, int64_t n, const AdamWScalars* scalars, void* stream);
int launch_sgd(const ParameterArrays* parameter, const float* gradient, float* buffer, int64_t n,
               int nesterov, const SgdScalars* scalars, void* stream);
int launch_any_precision_adamw(const AnyPrecisionArrays* arrays, int64_t n,
                               const AnyPrecisionScalars* scalars, void* stream);
int launch_adamw_8bit(const ParameterArrays* parameter, const float* gradient,
                      const QuantizedState* state, int64_t n, const AdamWScalars* scalars,
                      void* stream);

// cuda_quantized.cu
int launch_quantize_4bit(const void* values, FoldType type, int64_t numel, FourBitCode code,
                         int64_t blocksize, uint8_t* packed, float* absmax, void* stream);
int launch_dequantize_4bit(const uint8_t* packed, const float* absmax, int64_t numel,
                           FourBitCode code, int64_t blocksize, void* values, FoldType type,
                           void* stream);
int launch_dequantize_absmax(const uint8_t* codes, const float* nested_absmax, float offset,
                             int64_t skip, int64_t n, float* absmax, void* stream);
int launch_quantize_int8(const void* values, FoldType type, int64_t rows, int64_t columns,
                         int8_t* codes, float* absmax, void* stream);
int launch_dequantize_int8(const int8_t* codes, const float* absmax, int64_t columns, int64_t skip,
                           int64_t numel, void* values, FoldType type, void* stream);

}  // namespace fsdp::kernels
