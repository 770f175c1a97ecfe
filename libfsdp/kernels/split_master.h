// bfloat16 parameters that carry an exact fp32 master: see Note [Split master] in element_math.h.
#pragma once

#include <cstdint>

namespace fsdp::kernels {

/// high[i] = bfloat16 bits of master[i], remainder[i] = what makes it exact. Arrays of n; they do
/// not overlap. Cost: one pass, 8 bytes per element.
void split_master_cpu(const float* master, uint16_t* high, uint16_t* remainder, int64_t n);

/// The inverse: master[i] from high[i] and remainder[i].
void join_master_cpu(const uint16_t* high, const uint16_t* remainder, float* master, int64_t n);

}  // namespace fsdp::kernels
