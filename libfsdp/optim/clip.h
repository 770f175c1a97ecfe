// Global gradient norm, clipping, and the count of numbers that are not finite.
#pragma once

#include <cstdint>

#include "libfsdp/kernels/square_sum.h"

namespace fsdp::optim {

/// What a step does with its gradient; equal on all ranks when the square sums are.
struct ClipDecision {
  double grad_norm =
      0;  ///< Norm of gradient * inverse_tokens, before clipping; NaN when not finite.
  double coefficient =
      1;  ///< min(1, max_norm / (grad_norm + 1e-6)); 0 when the gradient is not finite.
  double gradient_scale = 1;  ///< coefficient * inverse_tokens, for UpdateScalars.
  bool finite = true;         ///< False: some element is infinite or NaN, nothing must be updated.
};

/// min(1, max_norm / (norm + 1e-6)), the formula of torch.nn.utils.clip_grad_norm_, in double; 1
/// when max_norm <= 0.
double clip_coefficient(double norm, double max_norm);

/// Decides from the sum of squares of the summed (not averaged) gradient over all ranks.
///
/// `inverse_tokens` = 1 / trainable tokens of the global batch. `max_norm` as in
/// clip_coefficient().
ClipDecision clip_decision(const kernels::SquareSum& square_sum, double inverse_tokens,
                           double max_norm);

}  // namespace fsdp::optim
