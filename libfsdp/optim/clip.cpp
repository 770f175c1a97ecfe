#include "libfsdp/optim/clip.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fsdp::optim {

double clip_coefficient(double norm, double max_norm) {
  return max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0;
}

ClipDecision clip_decision(const kernels::SquareSum& square_sum, double inverse_tokens,
                           double max_norm) {
  ClipDecision decision;
  decision.grad_norm = std::sqrt(square_sum.sum.to_double()) * inverse_tokens;
  decision.finite = square_sum.non_finite == 0 && std::isfinite(decision.grad_norm);
  if (!decision.finite) {
    decision.grad_norm = std::numeric_limits<double>::quiet_NaN();
    decision.coefficient = 0;
    decision.gradient_scale = 0;
    return decision;
  }
  decision.coefficient = clip_coefficient(decision.grad_norm, max_norm);
  decision.gradient_scale = decision.coefficient * inverse_tokens;
  return decision;
}

}  // namespace fsdp::optim
