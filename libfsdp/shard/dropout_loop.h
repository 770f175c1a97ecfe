// The arithmetic of dropout over plain memory, without LibTorch.
//
// Note [Dropout mask] Element i is dropped when its 32 random bits lie below p * 2^32. They are
// word (i % 64) / 16 of Philox with counter (i / 64) * 16 + i % 16: sixteen counters make the words
// of 64 elements in a row, which keeps the lanes of a vector apart.
#pragma once

#include <cstdint>

#include "libfsdp/base/dtype.h"

namespace fsdp {

/// to[i] = from[i] * (element begin + i is dropped ? 0 : 1 / (1 - p)) for i in [0, n).
///
/// Pure function of (key, p, element); arithmetic in fp32, rounded once. `to` may be `from`.
/// `dtype`: kF32, kBF16 or kF16; p in [0, 1]. About 1 ns an element (fp16: 4). Throws InternalError
/// for other types.
void apply_dropout(const void* from, void* to, DType dtype, int64_t begin, int64_t n, uint64_t key,
                   double p);

}  // namespace fsdp
