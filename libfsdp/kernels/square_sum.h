// Sum of squares of a gradient shard, for the global norm: the same bits however the shards are
// cut.
#pragma once

#include <cstdint>

#include "libfsdp/kernels/exact_sum.h"

namespace fsdp::kernels {

struct SquareSum {
  ExactSum sum;  ///< Sum of squares of all quanta whose own sum is finite.
  int64_t non_finite =
      0;  ///< Elements that were infinite or NaN; their quanta are missing in `sum`.

  void add(const SquareSum& other) {
    sum.add(other.sum);
    non_finite += other.non_finite;
  }
};

/// sums[q] = sum of squares of values[128 q .. 128 q + 127] in double, see Note [Order of a square
/// sum]; a quantum with an element that is not finite gives 0. Returns the number of such elements.
/// `n` is a multiple of 128.
int64_t quantum_square_sums(const float* values, int64_t n, double* sums);

/// Adds all quanta of values[0..n) to `total`. Cost: one pass over 4 n bytes; no allocation.
/// Throws InternalError unless n is a multiple of 128.
void add_square_sums(const float* values, int64_t n, SquareSum& total);

}  // namespace fsdp::kernels
