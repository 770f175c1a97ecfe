// One optimizer step over a flat range, in one pass over memory. `n` is free: an element's result
// does not depend on where the range begins or ends. Arrays do not overlap. The scalars are in
// element_math.h.
#pragma once

#include <cstdint>

#include "libfsdp/kernels/element_math.h"

namespace fsdp::kernels {

/// torch.optim.AdamW on an fp32 master, in place. Cost: 16 bytes read, 12 written per element.
void adamw_f32(float* master, const float* gradient, float* exp_avg, float* exp_avg_sq, int64_t n,
               const AdamWScalars& scalars);
/// The same on a split master (Note [Split master]).
void adamw_split(uint16_t* high, uint16_t* remainder, const float* gradient, float* exp_avg,
                 float* exp_avg_sq, int64_t n, const AdamWScalars& scalars);

/// torch.optim.SGD. `buffer` is the momentum buffer, zero before the first step; nullptr = without
/// momentum, and then `nesterov` is false.
void sgd_f32(float* master, const float* gradient, float* buffer, int64_t n, bool nesterov,
             const SgdScalars& scalars);
void sgd_split(uint16_t* high, uint16_t* remainder, const float* gradient, float* buffer, int64_t n,
               bool nesterov, const SgdScalars& scalars);

}  // namespace fsdp::kernels
