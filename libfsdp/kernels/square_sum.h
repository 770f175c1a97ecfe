// The sums of the 2-norm under their former name.
#pragma once

#include "libfsdp/kernels/gradient_sums.h"

namespace fsdp::kernels {

using SquareSum = GradientSums;

/// add_gradient_sums() for the 2-norm.
inline void add_square_sums(const float* values, int64_t n, SquareSum& total) {
  add_gradient_sums(values, n, NormType::kTwo, total);
}

}  // namespace fsdp::kernels
