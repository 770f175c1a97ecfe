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

}  // namespace fsdp::kernels
