// One optimizer step over a flat range, in one pass over memory. `n` is free: an element's result
// does not depend on where the range begins or ends (8-bit: on where blocks do). Arrays do not
// overlap. The scalars are in element_math.h.
#pragma once

#include <cstdint>

#include "libfsdp/kernels/any_precision.h"
#include "libfsdp/kernels/element_math.h"
#include "libfsdp/kernels/parameter_forms.h"
#include "libfsdp/kernels/quantized_state.h"

namespace fsdp::kernels {

/// torch.optim.AdamW in fp32, in place. Cost: an fp32 master reads 16 bytes and writes 12 per
/// element.
void adamw(const ParameterArrays& parameter, const float* gradient, float* exp_avg,
           float* exp_avg_sq, int64_t n, const AdamWScalars& scalars);

/// torch.optim.SGD. `buffer` is the momentum buffer, zero before the first step; nullptr = without
/// momentum, and then `nesterov` is false.
void sgd(const ParameterArrays& parameter, const float* gradient, float* buffer, int64_t n,
         bool nesterov, const SgdScalars& scalars);

/// AnyPrecisionAdamW, see Note [AnyPrecision]. All arrays of n elements.
void any_precision_adamw(const AnyPrecisionArrays& arrays, int64_t n,
                         const AnyPrecisionScalars& scalars);

/// AdamW in fp32 over state of 8 bits, see Note [8-bit state]. Blocks begin at element 0; the last
/// may be short. Cost: an fp32 master reads 10 bytes and writes 6 per element.
void adamw_8bit(const ParameterArrays& parameter, const float* gradient,
                const QuantizedState& state, int64_t n, const AdamWScalars& scalars);

}  // namespace fsdp::kernels
