#include "libfsdp/optim/clip.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "libfsdp/base/error.h"

namespace fsdp::optim {
namespace {

double norm_of(const kernels::GradientSums& sums, NormType type) {
  switch (type) {
    case NormType::kOne:
      return sums.sum.to_double();
    case NormType::kInf:
      return static_cast<double>(sums.max_abs);
    case NormType::kTwo:
      break;
  }
  return std::sqrt(sums.sum.to_double());
}

}  // namespace

NormType norm_type_from_name(std::string_view name) {
  if (name == "2" || name == "2.0") return NormType::kTwo;
  if (name == "1" || name == "1.0") return NormType::kOne;
  if (name == "inf") return NormType::kInf;
  throw ConfigError(cat("unknown norm '", name, "'. Known: 2, 1, inf"));
}

void ClipOptions::validate() const {
  if (!(clip_value >= 0) || !std::isfinite(clip_value)) {
    throw ConfigError(
        cat("clipping: clip_value is ", clip_value, "; expected a finite number >= 0"));
  }
}

double clip_coefficient(double norm, double max_norm) {
  return max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0;
}

ClipDecision clip_decision(const kernels::GradientSums& sums, double inverse_tokens,
                           const ClipOptions& options) {
  ClipDecision decision{.clip_value = options.clip_value};
  decision.grad_norm = norm_of(sums, options.norm_type) * inverse_tokens;
  decision.finite = sums.non_finite == 0 && std::isfinite(decision.grad_norm);
  if (!decision.finite) {
    decision.grad_norm = std::numeric_limits<double>::quiet_NaN();
    decision.coefficient = 0;
    decision.gradient_scale = 0;
    return decision;
  }
  decision.coefficient = clip_coefficient(decision.grad_norm, options.max_norm);
  decision.gradient_scale = decision.coefficient * inverse_tokens;
  return decision;
}

ClipDecision clip_decision(const kernels::GradientSums& square_sums, double inverse_tokens,
                           double max_norm) {
  return clip_decision(square_sums, inverse_tokens, ClipOptions{.max_norm = max_norm});
}

}  // namespace fsdp::optim
