#include "libfsdp/optim/flat_optimizers.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/compute.h"

namespace fsdp::optim {
namespace {

float clip_bound(const UpdateScalars& scalars) {
  return scalars.clip_value > 0 ? static_cast<float>(scalars.clip_value)
                                : std::numeric_limits<float>::infinity();
}

/// What a step's formula takes from the options, in double.
struct AdamFactors {
  double rate;
  double decay;
  double step_size;
  double bias_correction2_sqrt;

  AdamFactors(const OptimizerOptions& options, const ParamGroup& group,
              const UpdateScalars& scalars)
      : rate(scalars.learning_rate * group.lr_scale),
        decay(1 - rate * group.weight_decay),
        step_size(rate / (1 - std::pow(options.beta1, static_cast<double>(scalars.step)))),
        bias_correction2_sqrt(
            std::sqrt(1 - std::pow(options.beta2, static_cast<double>(scalars.step)))) {}
};

kernels::AdamWScalars adamw_scalars(const OptimizerOptions& options, const ParamGroup& group,
                                    const UpdateScalars& scalars) {
  const AdamFactors factors(options, group, scalars);
  return {.grad_scale = static_cast<float>(scalars.gradient_scale),
          .clip_value = clip_bound(scalars),
          .decay = static_cast<float>(factors.decay),
          .one_minus_beta1 = static_cast<float>(1 - options.beta1),
          .beta2 = static_cast<float>(options.beta2),
          .one_minus_beta2 = static_cast<float>(1 - options.beta2),
          .step_size = static_cast<float>(factors.step_size),
          .bias_correction2_sqrt = static_cast<float>(factors.bias_correction2_sqrt),
          .epsilon = static_cast<float>(options.epsilon)};
}

kernels::AnyPrecisionScalars any_precision_scalars(const OptimizerOptions& options,
                                                   const ParamGroup& group,
                                                   const UpdateScalars& scalars) {
  const AdamFactors factors(options, group, scalars);
  return {.grad_scale = static_cast<float>(scalars.gradient_scale),
          .clip_value = clip_bound(scalars),
          .decay = static_cast<float>(factors.decay),
          .beta1 = static_cast<float>(options.beta1),
          .one_minus_beta1 = static_cast<float>(1 - options.beta1),
          .beta2 = static_cast<float>(options.beta2),
          .one_minus_beta2 = static_cast<float>(1 - options.beta2),
          .step_size = static_cast<float>(factors.step_size),
          .bias_correction2_sqrt = static_cast<float>(factors.bias_correction2_sqrt),
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

/// One segment of a view in one step.
struct SegmentUpdate {
  const BucketView& view;
  const GroupSegment& segment;
  const ParamGroup& group;
  const UpdateScalars& scalars;

  int64_t begin() const { return segment.begin; }
  int64_t numel() const { return segment.end - segment.begin; }
  const float* gradient() const { return view.gradient + begin(); }
  kernels::RoundingKey key() const {
    return kernels::rounding_key(scalars.seed, scalars.step, segment.parameter);
  }
};

kernels::ParameterForm form_of(const BucketView& view, bool stochastic) {
  using kernels::ParameterForm;
  if (view.copy != nullptr) {
    return view.copy_dtype == DType::kF16 ? ParameterForm::kF32AndF16 : ParameterForm::kF32AndBf16;
  }
  if (view.master != nullptr) return ParameterForm::kF32;
  if (view.remainder != nullptr) return ParameterForm::kSplit;
  return stochastic ? ParameterForm::kBf16Stochastic : ParameterForm::kBf16;
}

template <class T>
T* offset(T* array, int64_t at) {
  return array == nullptr ? nullptr : array + at;
}

/// The state in one block, and the walk over segments; the formulas are the derived classes'.
class FlatOptimizer : public ShardOptimizer {
 public:
  FlatOptimizer(const OptimizerOptions& options, int64_t numel, const StatePlan& plan,
                kernels::Compute& compute)
      : options_(options),
        numel_(numel),
        compute_(compute),
        memory_(compute.allocate(static_cast<size_t>(plan.bytes()), "optimizer state")) {
    std::byte* next = memory_.get();
    for (const StateArray& array : plan.arrays()) {
      state_.push_back({.name = array.name,
                        .dtype = array.dtype,
                        .values = {next, static_cast<size_t>(array.bytes())},
                        .elements_per_value = array.elements_per_value,
                        .begin = array.begin});
      next += StatePlan::padded_bytes(array);
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
      if (segment.begin == segment.end) continue;
      update_segment({view, segment, view.groups[static_cast<size_t>(segment.group)], scalars});
    }
  }

  std::span<const StateTensor> state_tensors() final { return state_; }

 protected:
  virtual void update_segment(const SegmentUpdate& update) = 0;

  const OptimizerOptions& options() const { return options_; }
  kernels::Compute& compute() const { return compute_; }
  const std::vector<StateTensor>& state() const { return state_; }

  /// Value of state array `index` that belongs to element `at` of the shard.
  template <class T>
  T* state_at(size_t index, int64_t at) const {
    const StateTensor& tensor = state_[index];
    return reinterpret_cast<T*>(tensor.values.data()) +
           (at - tensor.begin) / tensor.elements_per_value;
  }

  kernels::ParameterArrays parameter(const SegmentUpdate& update) const {
    const BucketView& view = update.view;
    return {.form = form_of(view, options_.stochastic_rounding),
            .master = offset(view.master, update.begin()),
            .copy = offset(view.copy, update.begin()),
            .high = offset(view.high, update.begin()),
            .remainder = offset(view.remainder, update.begin()),
            .key = update.key(),
            .first = update.segment.param_at};
  }

 private:
  void check_view(const BucketView& view) const {
    check(view.numel == numel_, "optimizer: the view's size is not that of its shard");
    if (numel_ == 0) return;
    const bool has_master = view.master != nullptr;
    check(has_master != (view.high != nullptr) && view.gradient != nullptr,
          "optimizer: a view has either an fp32 master or a bf16 parameter, and a gradient");
    check(has_master ? view.remainder == nullptr : view.copy == nullptr,
          "optimizer: a remainder belongs to a bf16 parameter, a copy to an fp32 master");
    check(view.copy_dtype == DType::kBF16 || view.copy_dtype == DType::kF16,
          "optimizer: the copy of a master is bf16 or f16");
  }

  OptimizerOptions options_;
  int64_t numel_;
  kernels::Compute& compute_;
  kernels::ComputeMemory memory_;
  std::vector<StateTensor> state_;
};

class AdamW final : public FlatOptimizer {
 public:
  using FlatOptimizer::FlatOptimizer;

 private:
  void update_segment(const SegmentUpdate& update) final {
    compute().adamw(parameter(update), update.gradient(), state_at<float>(0, update.begin()),
                    state_at<float>(1, update.begin()), update.numel(),
                    adamw_scalars(options(), update.group, update.scalars));
  }
};

class Sgd final : public FlatOptimizer {
 public:
  using FlatOptimizer::FlatOptimizer;

 private:
  void update_segment(const SegmentUpdate& update) final {
    float* buffer = state().empty() ? nullptr : state_at<float>(0, update.begin());
    compute().sgd(parameter(update), update.gradient(), buffer, update.numel(), options().nesterov,
                  sgd_scalars(options(), update.group, update.scalars));
  }
};

kernels::AnyType any_type(DType dtype) {
  return dtype == DType::kF32 ? kernels::AnyType::kF32 : kernels::AnyType::kBf16;
}

class AnyPrecisionAdamW final : public FlatOptimizer {
 public:
  using FlatOptimizer::FlatOptimizer;

 private:
  void* bytes_at(size_t index, int64_t at) const {
    const StateTensor& tensor = state()[index];
    return tensor.values.data() + at * static_cast<int64_t>(dtype_bytes(tensor.dtype));
  }

  void update_segment(const SegmentUpdate& update) final {
    const BucketView& view = update.view;
    if (view.copy != nullptr || view.remainder != nullptr) {
      throw ConfigError(
          "optimizer: adamw_anyprecision updates a parameter without a master beside it. Hint: "
          "pure bf16 or fp32 precision.");
    }
    const int64_t at = update.begin();
    const bool is_f32 = view.master != nullptr;
    kernels::AnyPrecisionArrays arrays{
        .parameter_type = is_f32 ? kernels::AnyType::kF32 : kernels::AnyType::kBf16,
        .parameter = is_f32 ? static_cast<void*>(view.master + at) : view.high + at,
        .gradient = update.gradient(),
        .exp_avg_type = any_type(options().momentum_dtype),
        .exp_avg = bytes_at(0, at),
        .exp_avg_sq_type = any_type(options().variance_dtype),
        .exp_avg_sq = bytes_at(1, at),
        .compensation_type = any_type(options().compensation_buffer_dtype),
        .compensation = options().use_kahan_summation ? bytes_at(2, at) : nullptr,
        .stochastic = options().stochastic_rounding && !is_f32,
        .key = update.key(),
        .first = update.segment.param_at};
    compute().any_precision_adamw(arrays, update.numel(),
                                  any_precision_scalars(options(), update.group, update.scalars));
  }
};

class AdamW8bit final : public FlatOptimizer {
 public:
  AdamW8bit(const OptimizerOptions& options, int64_t numel, const StatePlan& plan,
            kernels::Compute& compute)
      : FlatOptimizer(options, numel, plan, compute) {
    for (size_t i = 0; i < state().size();) {
      const StateTensor& first = state()[i];
      const bool quantized = first.dtype == DType::kU8;
      const auto values = static_cast<int64_t>(first.values.size() / dtype_bytes(first.dtype));
      pieces_.push_back({.begin = first.begin, .end = first.begin + values, .state = i});
      i += quantized ? 4 : 2;
    }
  }

 private:
  /// Elements of the shard whose state is the arrays from number `state` on.
  struct Piece {
    int64_t begin;
    int64_t end;
    size_t state;
  };

  const Piece& piece_of(const SegmentUpdate& update) const {
    const auto after =
        std::upper_bound(pieces_.begin(), pieces_.end(), update.begin(),
                         [](int64_t at, const Piece& piece) { return at < piece.begin; });
    check(after != pieces_.begin() && update.segment.end <= std::prev(after)->end,
          "optimizer: a segment is not one that 8-bit state was made for");
    return *std::prev(after);
  }

  void update_segment(const SegmentUpdate& update) final {
    const Piece& piece = piece_of(update);
    const int64_t at = update.begin();
    const size_t s = piece.state;
    const kernels::AdamWScalars scalars = adamw_scalars(options(), update.group, update.scalars);
    if (state()[s].dtype == DType::kF32) {
      compute().adamw(parameter(update), update.gradient(), state_at<float>(s, at),
                      state_at<float>(s + 1, at), update.numel(), scalars);
      return;
    }
    check((at - piece.begin) % kernels::kStateBlock == 0 &&
              (update.segment.end == piece.end || update.numel() % kernels::kStateBlock == 0),
          "optimizer: a segment cuts a block of 8-bit state");
    compute().adamw_8bit(parameter(update), update.gradient(),
                         {.code1 = state_at<uint8_t>(s, at),
                          .absmax1 = state_at<float>(s + 1, at),
                          .code2 = state_at<uint8_t>(s + 2, at),
                          .absmax2 = state_at<float>(s + 3, at)},
                         update.numel(), scalars);
  }

  std::vector<Piece> pieces_;
};

}  // namespace

std::unique_ptr<ShardOptimizer> make_flat_optimizer(const OptimizerOptions& options, int64_t numel,
                                                    std::span<const GroupSegment> segments,
                                                    kernels::Compute& compute) {
  const StatePlan plan(options, numel, segments);
  switch (options.kind) {
    case OptimizerKind::kSgd:
      return std::make_unique<Sgd>(options, numel, plan, compute);
    case OptimizerKind::kAnyPrecisionAdamW:
      return std::make_unique<AnyPrecisionAdamW>(options, numel, plan, compute);
    case OptimizerKind::kAdamW8bit:
      return std::make_unique<AdamW8bit>(options, numel, plan, compute);
    case OptimizerKind::kAdamW:
      break;
  }
  return std::make_unique<AdamW>(options, numel, plan, compute);
}

}  // namespace fsdp::optim
