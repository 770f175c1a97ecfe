// Scale of the loss for fp16 training: the rule of torch.amp.GradScaler.
#pragma once

#include <cstdint>

namespace fsdp::optim {

/// Defaults are PyTorch's.
struct LossScalerOptions {
  double init_scale = 65536;  ///< Of the mean loss; see LossScaler::start.
  double growth_factor = 2;
  double backoff_factor = 0.5;
  int64_t growth_interval = 2000;  ///< Steps without a non-finite gradient until the scale grows.

  /// Throws ConfigError for a value that makes no rule.
  void validate() const;
};

/// What a checkpoint keeps.
struct LossScalerState {
  float scale = 65536;
  int64_t growth_tracker = 0;  ///< Finite steps since the scale changed.
  bool operator==(const LossScalerState&) const = default;
};

/// Multiplies the loss so that small gradients survive fp16; each step's gradient is divided by it
/// again (in ClipDecision's inverse_tokens).
///
/// A pure function of the steps' outcomes: ranks that agree on whether a gradient was finite (the
/// step packet's count) hold equal scales without talking. A value; not thread-safe.
class LossScaler {
 public:
  /// Throws ConfigError (options).
  explicit LossScaler(const LossScalerOptions& options = {});

  /// To be called before the first scaled backward with about the tokens of that step: losses are
  /// sums over tokens, so their scale is init_scale divided by `tokens`, rounded up to a power of
  /// two. Does nothing when it was called before, or after restore().
  void start(int64_t tokens);

  /// The scale of the next step's losses.
  double scale() const { return static_cast<double>(state_.scale); }

  /// After a step. `found_inf`: some element of its gradient was not finite, and nothing was
  /// updated.
  void update(bool found_inf);

  const LossScalerState& state() const { return state_; }
  void restore(const LossScalerState& state) {
    state_ = state;
    started_ = true;
  }

 private:
  LossScalerOptions options_;
  LossScalerState state_;
  bool started_ = false;
};

}  // namespace fsdp::optim
