// Optimizers over one rank's flat shards: AdamW and SGD with PyTorch's formulas, parameter groups
// by segments.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace fsdp::optim {

enum class OptimizerKind { kAdamW, kSgd };
constexpr std::array<std::pair<OptimizerKind, std::string_view>, 2> names_of(OptimizerKind) {
  return {{{OptimizerKind::kAdamW, "adamw"}, {OptimizerKind::kSgd, "sgd"}}};
}

/// "adamw" (also adamw_torch, adamw_torch_fused) or "sgd"; throws ConfigError that lists them.
OptimizerKind optimizer_kind_from_name(std::string_view name);

/// Defaults are PyTorch's. Weight decay and rate scales belong to the groups.
struct OptimizerOptions {
  OptimizerKind kind = OptimizerKind::kAdamW;
  double beta1 = 0.9;     ///< AdamW.
  double beta2 = 0.999;   ///< AdamW.
  double epsilon = 1e-8;  ///< AdamW.
  double momentum = 0;    ///< SGD; 0 = no buffer.
  bool nesterov = false;  ///< SGD; needs momentum.

  /// Throws ConfigError for a value outside PyTorch's range.
  void validate() const;
};

/// Options of some of the parameters.
struct ParamGroup {
  std::string name;
  double lr_scale = 1;
  double weight_decay = 0;  ///< Decoupled for AdamW, added to the gradient for SGD, as in PyTorch.
};

/// Elements [begin, end) of a shard belong to `group`. What no segment covers (padding, parameters
/// that no rank used in this step) is not touched by an update.
struct GroupSegment {
  int64_t begin = 0;
  int64_t end = 0;
  int group = 0;
};

/// One rank's shard of one bucket, where it lives now. Either `master`, or `high` and `remainder`
/// (a bfloat16 parameter with an exact fp32 master, see kernels/element_math.h, Note [Split
/// master]).
struct BucketView {
  float* master = nullptr;
  uint16_t* high = nullptr;
  uint16_t* remainder = nullptr;
  const float* gradient = nullptr;  ///< Sum over micro-batches and ranks.
  int64_t numel = 0;                ///< That of the optimizer.
  std::span<const GroupSegment> segments;
  std::span<const ParamGroup> groups;
};

/// What an update needs besides the arrays; equal on all ranks.
struct UpdateScalars {
  double learning_rate = 0;
  int64_t step = 1;  ///< 1 at the first update (bias correction).
  double gradient_scale =
      1;  ///< Multiplied into the gradient in the same pass: clip coefficient / tokens.
};

/// One array of optimizer state, as long as the shard and laid out as the shard is.
struct StateTensor {
  std::string_view name;  ///< PyTorch's: "exp_avg", "exp_avg_sq", "momentum_buffer".
  std::span<float> values;
};

/// Updates one bucket's shard in place. Owns its state, allocated once, zero at first. Used by one
/// thread at a time.
class ShardOptimizer {
 public:
  virtual ~ShardOptimizer() = default;

  /// One step. An element's result depends on its own numbers only, not on where it lies.
  ///
  /// Memory: allocates nothing. Cost: one pass over parameter, gradient and state.
  /// Throws InternalError when the view does not fit: its size, a segment, a group.
  virtual void update(const BucketView& view, const UpdateScalars& scalars) = 0;

  /// All state by name, for checkpoints: read it, or write what was saved into it.
  virtual std::span<const StateTensor> state_tensors() = 0;
};

/// Bytes of optimizer state per parameter (parameter, master and gradient not included), for the
/// memory plan.
int state_bytes_per_parameter(const OptimizerOptions& options);

/// Makes the optimizer of a shard of `numel` elements (0 is legal) in host memory. Throws
/// ConfigError (options) or HostResourceError.
std::unique_ptr<ShardOptimizer> make_optimizer(const OptimizerOptions& options, int64_t numel);

}  // namespace fsdp::optim
