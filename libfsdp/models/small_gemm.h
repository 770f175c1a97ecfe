// Small row-major fp32 matrix products inside one thread, for tiles that stay in the cache.
#pragma once

#include <cstdint>

namespace fsdp::models {

/// c [m, n] = a [m, k] b [k, n] (+ c if `accumulate`); the strides are those of rows.
///
/// Cost: oneDNN's micro-kernel where the CPU has AVX-512 (2.5 times MKL's speed at 64 x 64 x 64 on
/// AMD), else ATen's mm.
///       A kernel is compiled for each new combination of sizes and strides: use few.
void small_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b,
                int64_t b_stride, float* c, int64_t c_stride, bool accumulate);

/// To be called by a thread after its last small_gemm of a piece of work.
void small_gemm_done();

}  // namespace fsdp::models
