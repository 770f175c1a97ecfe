// What a gradient shard adds to the global norm: the same bits however the shards are cut.
#pragma once

#include <cstdint>

#include "libfsdp/kernels/element_math.h"
#include "libfsdp/kernels/exact_sum.h"

namespace fsdp::kernels {

/// What all ranks' gradients come to, for one type of norm.
struct GradientSums {
  ExactSum sum;       ///< Of squares (2) or magnitudes (1), of all quanta whose own sum is finite.
  float max_abs = 0;  ///< Largest finite magnitude; for the infinity norm only.
  /// Elements that were infinite or NaN; their quanta are missing in `sum`.
  int64_t non_finite = 0;

  void add(const GradientSums& other) {
    sum.add(other.sum);
    max_abs = other.max_abs > max_abs ? other.max_abs : max_abs;
    non_finite += other.non_finite;
  }
};

/// sums[q] = sum of squares (kTwo) or magnitudes (kOne) of values[128 q .. 128 q + 127] in double,
/// see Note [Order of a quantum's sum]; a quantum with an element that is not finite gives 0.
/// Returns the number of such elements. `n` is a multiple of 128.
int64_t quantum_sums(const float* values, int64_t n, NormType type, double* sums);

/// Largest finite magnitude of values[0..n), at least `at_least`; adds the number of other elements
/// to `non_finite`.
float largest_magnitude(const float* values, int64_t n, float at_least, int64_t& non_finite);

/// Adds all of values[0..n) to `total`. Cost: one pass over 4 n bytes; no allocation.
/// Throws InternalError unless n is a multiple of 128.
void add_gradient_sums(const float* values, int64_t n, NormType type, GradientSums& total);

}  // namespace fsdp::kernels
