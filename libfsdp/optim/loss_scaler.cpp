#include "libfsdp/optim/loss_scaler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "libfsdp/base/error.h"

namespace fsdp::optim {

void LossScalerOptions::validate() const {
  if (!(init_scale > 0) || !std::isfinite(static_cast<float>(init_scale)))
    throw ConfigError(cat("loss scale: init_scale is ", init_scale, "; expected a float above 0"));
  if (!(growth_factor > 1))
    throw ConfigError(cat("loss scale: growth_factor is ", growth_factor, "; expected above 1"));
  if (!(backoff_factor > 0 && backoff_factor < 1)) {
    throw ConfigError(
        cat("loss scale: backoff_factor is ", backoff_factor, "; expected between 0 and 1"));
  }
  if (growth_interval < 1)
    throw ConfigError(cat("loss scale: growth_interval is ", growth_interval, "; expected >= 1"));
}

LossScaler::LossScaler(const LossScalerOptions& options) : options_(options) {
  options.validate();
  state_.scale = static_cast<float>(options.init_scale);
}

void LossScaler::start(int64_t tokens) {
  if (std::exchange(started_, true)) return;
  const auto divisor = std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(tokens, 1)));
  state_.scale = static_cast<float>(options_.init_scale / static_cast<double>(divisor));
}

void LossScaler::update(bool found_inf) {
  if (found_inf) {
    state_.scale = static_cast<float>(scale() * options_.backoff_factor);
    state_.growth_tracker = 0;
    return;
  }
  if (++state_.growth_tracker < options_.growth_interval) return;
  state_.growth_tracker = 0;
  const auto grown = static_cast<float>(scale() * options_.growth_factor);
  if (std::isfinite(grown)) state_.scale = grown;
}

}  // namespace fsdp::optim
