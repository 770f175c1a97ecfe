// Rank-order sums into fp32: the reduction that makes gradients equal at any number of ranks.
#pragma once

#include <cstdint>
#include <span>

#include "libfsdp/base/dtype.h"

namespace fsdp::kernels {

/// destination[i] = source[i] widened to fp32. `dtype` is f32, bf16 or f16; else InternalError. No
/// overlap.
void fold_assign(float* destination, const void* source, DType dtype, int64_t n);

/// destination[i] = destination[i] + source[i]. As fold_assign.
void fold_add(float* destination, const void* source, DType dtype, int64_t n);

/// destination[i] = ((s_0[i] + s_1[i]) + s_2[i]) + ...; with `accumulate` the old destination[i] is
/// the leftmost operand. Bit for bit the sequence fold_assign(s_0) (fold_add(s_0) with accumulate),
/// fold_add(s_1), ...
///
/// Sources: each n elements of `dtype` (f32, bf16, f16), none overlaps the destination; without
/// accumulate the destination may be one of them (f32). No source leaves the destination as it is
/// with accumulate, and zero without. Cost: one pass over memory; large sums that do not accumulate
/// are stored past the caches. Throws InternalError for other dtypes.
void fold_ranks(float* destination, std::span<const void* const> sources, DType dtype, int64_t n,
                bool accumulate);

}  // namespace fsdp::kernels
