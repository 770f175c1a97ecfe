// Global gradient norm, clipping, and the count of numbers that are not finite.
#pragma once

#include <cstdint>
#include <string_view>

#include "libfsdp/kernels/gradient_sums.h"

namespace fsdp::optim {

using kernels::NormType;

/// "2", "1" or "inf" (also "2.0", "1.0"); throws ConfigError that lists them.
NormType norm_type_from_name(std::string_view name);

struct ClipOptions {
  double max_norm = 0;  ///< As in clip_coefficient().
  NormType norm_type = NormType::kTwo;
  double clip_value = 0;  ///< Largest magnitude of an element of the mean gradient; 0 = no limit.

  /// Throws ConfigError for a negative or infinite clip_value.
  void validate() const;
};

/// What a step does with its gradient; equal on all ranks when the sums are.
struct ClipDecision {
  double grad_norm =
      0;  ///< Norm of gradient * inverse_tokens, before clipping; NaN when not finite.
  double coefficient =
      1;  ///< min(1, max_norm / (grad_norm + 1e-6)); 0 when the gradient is not finite.
  double gradient_scale = 1;  ///< coefficient * inverse_tokens, for UpdateScalars.
  double clip_value = 0;      ///< For UpdateScalars.
  bool finite = true;         ///< False: some element is infinite or NaN, nothing must be updated.
};

/// min(1, max_norm / (norm + 1e-6)), the formula of torch.nn.utils.clip_grad_norm_, in double; 1
/// when max_norm <= 0.
double clip_coefficient(double norm, double max_norm);

/// Decides from the sums of the summed (not averaged) gradient over all ranks, taken for
/// options.norm_type.
///
/// `inverse_tokens` = 1 / trainable tokens of the global batch, and 1 / loss scale for fp16. With
/// both limits an element is clamped after the norm was clipped.
ClipDecision clip_decision(const kernels::GradientSums& sums, double inverse_tokens,
                           const ClipOptions& options);
/// For the 2-norm alone.
ClipDecision clip_decision(const kernels::GradientSums& square_sums, double inverse_tokens,
                           double max_norm);

}  // namespace fsdp::optim
