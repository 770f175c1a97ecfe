#include "libfsdp/optim/optimizer.h"

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"
#include "libfsdp/device/host_arena.h"
#include "libfsdp/kernels/update.h"

namespace fsdp::optim {
namespace {

constexpr int64_t kStateAlignment = 64;

using StateNames = std::span<const std::string_view>;
constexpr std::array<std::string_view, 2> kAdamWState = {"exp_avg", "exp_avg_sq"};
constexpr std::array<std::string_view, 1> kMomentumState = {"momentum_buffer"};

StateNames state_names(const OptimizerOptions& options) {
  if (options.kind == OptimizerKind::kAdamW) return kAdamWState;
  return options.momentum != 0 ? StateNames(kMomentumState) : StateNames();
}

void require(bool condition, std::string_view field, double value, std::string_view expected) {
  if (!condition)
    throw ConfigError(cat("optimizer: ", field, " is ", value, "; expected ", expected));
}

float clip_bound(const UpdateScalars& scalars) {
  return scalars.clip_value > 0 ? static_cast<float>(scalars.clip_value)
                                : std::numeric_limits<float>::infinity();
}

kernels::AdamWScalars adamw_scalars(const OptimizerOptions& options, const ParamGroup& group,
                                    const UpdateScalars& scalars) {
  const double rate = scalars.learning_rate * group.lr_scale;
  const auto step = static_cast<double>(scalars.step);
  const double correction1 = 1 - std::pow(options.beta1, step);
  const double correction2 = 1 - std::pow(options.beta2, step);
  return {.grad_scale = static_cast<float>(scalars.gradient_scale),
          .clip_value = clip_bound(scalars),
          .decay = static_cast<float>(1 - rate * group.weight_decay),
          .one_minus_beta1 = static_cast<float>(1 - options.beta1),
          .beta2 = static_cast<float>(options.beta2),
          .one_minus_beta2 = static_cast<float>(1 - options.beta2),
          .step_size = static_cast<float>(rate / correction1),
          .bias_correction2_sqrt = static_cast<float>(std::sqrt(correction2)),
          .epsilon = static_cast<float>(options.epsilon)};
}

kernels::SgdScalars sgd_scalars(const OptimizerOptions& options, const ParamGroup& group,
                                const UpdateScalars& scalars) {
  return {.grad_scale = static_cast<float>(scalars.gradient_scale),
          .clip_value = clip_bound(scalars),
          .weight_decay = static_cast<float>(group.weight_decay),
          .learning_rate = static_cast<float>(scalars.learning_rate * group.lr_scale),
          .momentum = static_cast<float>(options.momentum)};
}

/// The state in one arena, and the walk over segments; the formulas are the derived classes'.
class HostOptimizer : public ShardOptimizer {
 public:
  HostOptimizer(const OptimizerOptions& options, int64_t numel)
      : options_(options),
        numel_(numel),
        arena_(static_cast<size_t>(state_bytes(options, numel)), {.label = "optimizer state"}) {
    for (const std::string_view name : state_names(options)) {
      state_.push_back({.name = name,
                        .dtype = DType::kF32,
                        .values = std::as_writable_bytes(arena_.allocate_array<float>(numel))});
    }
  }

  void update(const BucketView& view, const UpdateScalars& scalars) final {
    check_view(view);
    check(scalars.step >= 1, "optimizer: steps are counted from 1");
    for (const GroupSegment& segment : view.segments) {
      check(0 <= segment.begin && segment.begin <= segment.end && segment.end <= view.numel,
            "optimizer: a segment lies outside its shard");
      check(segment.group >= 0 && static_cast<size_t>(segment.group) < view.groups.size(),
            "optimizer: a segment names a group that does not exist");
      update_segment(view, segment, scalars);
    }
  }

  std::span<const StateTensor> state_tensors() final { return state_; }

 protected:
  virtual void update_segment(const BucketView& view, const GroupSegment& segment,
                              const UpdateScalars& scalars) = 0;

  const OptimizerOptions& options() const { return options_; }
  float* state(size_t index) const { return reinterpret_cast<float*>(state_[index].values.data()); }

 private:
  void check_view(const BucketView& view) const {
    check(view.numel == numel_, "optimizer: the view's size is not that of its shard");
    const bool is_split = view.high != nullptr && view.remainder != nullptr;
    check(view.numel == 0 || ((view.master != nullptr) != is_split && view.gradient != nullptr),
          "optimizer: a view has either an fp32 master or a bf16 parameter with its remainder, and "
          "a gradient");
  }

  OptimizerOptions options_;
  int64_t numel_;
  device::HostArena arena_;
  std::vector<StateTensor> state_;
};

const ParamGroup& group_of(const BucketView& view, const GroupSegment& segment) {
  return view.groups[static_cast<size_t>(segment.group)];
}

class AdamW final : public HostOptimizer {
 public:
  using HostOptimizer::HostOptimizer;

 private:
  void update_segment(const BucketView& view, const GroupSegment& segment,
                      const UpdateScalars& scalars) final {
    const int64_t at = segment.begin;
    const int64_t n = segment.end - at;
    float* exp_avg = state(0) + at;
    float* exp_avg_sq = state(1) + at;
    const kernels::AdamWScalars s = adamw_scalars(options(), group_of(view, segment), scalars);
    if (view.master != nullptr) {
      kernels::adamw_f32(view.master + at, view.gradient + at, exp_avg, exp_avg_sq, n, s);
    } else {
      kernels::adamw_split(view.high + at, view.remainder + at, view.gradient + at, exp_avg,
                           exp_avg_sq, n, s);
    }
  }
};

class Sgd final : public HostOptimizer {
 public:
  using HostOptimizer::HostOptimizer;

 private:
  void update_segment(const BucketView& view, const GroupSegment& segment,
                      const UpdateScalars& scalars) final {
    const int64_t at = segment.begin;
    const int64_t n = segment.end - at;
    float* buffer = options().momentum != 0 ? state(0) + at : nullptr;
    const kernels::SgdScalars s = sgd_scalars(options(), group_of(view, segment), scalars);
    if (view.master != nullptr) {
      kernels::sgd_f32(view.master + at, view.gradient + at, buffer, n, options().nesterov, s);
    } else {
      kernels::sgd_split(view.high + at, view.remainder + at, view.gradient + at, buffer, n,
                         options().nesterov, s);
    }
  }
};

}  // namespace

OptimizerKind optimizer_kind_from_name(std::string_view name) {
  if (name == "adamw" || name == "adamw_torch" || name == "adamw_torch_fused")
    return OptimizerKind::kAdamW;
  if (name == "sgd") return OptimizerKind::kSgd;
  throw ConfigError(
      cat("unknown optimizer '", name, "'. Known: adamw (adamw_torch, adamw_torch_fused), sgd"));
}

void OptimizerOptions::validate() const {
  require(beta1 >= 0 && beta1 < 1, "beta1", beta1, "0 <= beta1 < 1");
  require(beta2 >= 0 && beta2 < 1, "beta2", beta2, "0 <= beta2 < 1");
  require(epsilon >= 0 && std::isfinite(epsilon), "epsilon", epsilon, "a finite number >= 0");
  require(momentum >= 0 && std::isfinite(momentum), "momentum", momentum, "a finite number >= 0");
  if (kind == OptimizerKind::kAnyPrecisionAdamW || kind == OptimizerKind::kAdamW8bit)
    throw ConfigError("optimizer: AnyPrecision and 8-bit AdamW are not part of this build");
  if (nesterov && momentum == 0) throw ConfigError("optimizer: nesterov needs a momentum above 0");
}

int64_t state_bytes(const OptimizerOptions& options, int64_t numel,
                    std::span<const GroupSegment> /*segments*/) {
  check(numel >= 0, "optimizer: a shard has a negative size");
  const int64_t array_bytes = round_up(
      checked_mul(numel, static_cast<int64_t>(sizeof(float)), "optimizer state"), kStateAlignment);
  return checked_mul(array_bytes, static_cast<int64_t>(state_names(options).size()),
                     "optimizer state");
}

std::unique_ptr<ShardOptimizer> make_optimizer(const OptimizerOptions& options, int64_t numel,
                                               std::span<const GroupSegment> /*segments*/) {
  options.validate();
  if (options.kind == OptimizerKind::kSgd) return std::make_unique<Sgd>(options, numel);
  return std::make_unique<AdamW>(options, numel);
}

}  // namespace fsdp::optim
