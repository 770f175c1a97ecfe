// Optimizers over one rank's flat shards: AdamW and SGD with PyTorch's formulas, AnyPrecision
// AdamW, 8-bit AdamW; parameter groups by segments.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "libfsdp/base/dtype.h"
#include "libfsdp/kernels/compute.h"

namespace fsdp::optim {

enum class OptimizerKind { kAdamW, kSgd, kAnyPrecisionAdamW, kAdamW8bit };
constexpr std::array<std::pair<OptimizerKind, std::string_view>, 4> names_of(OptimizerKind) {
  return {{{OptimizerKind::kAdamW, "adamw"},
           {OptimizerKind::kSgd, "sgd"},
           {OptimizerKind::kAnyPrecisionAdamW, "adamw_anyprecision"},
           {OptimizerKind::kAdamW8bit, "adamw_8bit"}}};
}

/// "adamw" (also adamw_torch, adamw_torch_fused), "sgd", "adamw_anyprecision" (also anyprecision)
/// or "adamw_8bit" (also adamw_bnb_8bit); throws ConfigError that lists them.
OptimizerKind optimizer_kind_from_name(std::string_view name);

/// Defaults are PyTorch's, and those of transformers for AnyPrecision. Weight decay and rate scales
/// belong to the groups.
struct OptimizerOptions {
  OptimizerKind kind = OptimizerKind::kAdamW;
  double beta1 = 0.9;     ///< All but SGD.
  double beta2 = 0.999;   ///< All but SGD.
  double epsilon = 1e-8;  ///< All but SGD.
  double momentum = 0;    ///< SGD; 0 = no buffer.
  bool nesterov = false;  ///< SGD; needs momentum.
  /// Rounds a bf16 parameter that has no remainder up or down at random, by its distance from
  /// either (all kinds); false = to nearest even. Excludes Kahan summation.
  bool stochastic_rounding = false;
  DType momentum_dtype = DType::kF32;              ///< AnyPrecision: f32 or bf16.
  DType variance_dtype = DType::kF32;              ///< AnyPrecision: f32 or bf16.
  bool use_kahan_summation = false;                ///< AnyPrecision.
  DType compensation_buffer_dtype = DType::kBF16;  ///< AnyPrecision with Kahan: f32 or bf16.
  int64_t min_8bit_size = 4096;  ///< 8-bit: parameters with fewer elements keep fp32 state.

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
///
/// The last three say which elements of which parameter they are, so that random rounding and
/// blocks of state do not depend on how parameters are cut into shards.
struct GroupSegment {
  int64_t begin = 0;
  int64_t end = 0;
  int group = 0;
  uint64_t parameter = 0;   ///< A hash of the parameter's name.
  int64_t param_at = 0;     ///< Of `begin`, in the flattened parameter.
  int64_t param_numel = 0;  ///< Of the whole parameter; 0 = the segment is all of it.
};

/// One rank's shard of one bucket, where it lives now. The parameter is one of
/// - `master`: fp32; with `copy` each update also writes it there, rounded to nearest even,
/// - `high` and `remainder`: a bf16 parameter with an exact fp32 master, see
///   kernels/element_math.h, Note [Split master],
/// - `high` alone: a bf16 parameter and nothing else; the optimizer's options say how it is
/// rounded.
struct BucketView {
  float* master = nullptr;
  uint16_t* high = nullptr;
  uint16_t* remainder = nullptr;
  uint16_t* copy = nullptr;         ///< What the model computes with; only beside `master`.
  DType copy_dtype = DType::kBF16;  ///< bf16 or f16.
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
  double clip_value = 0;  ///< Then the gradient is clamped to [-clip_value, clip_value]; 0 = not.
  uint64_t seed = 0;      ///< Of stochastic rounding, with the step and the element's place.
};

/// One array of optimizer state over elements [begin, begin + number of values *
/// elements_per_value) of the shard; the last value may stand for fewer.
struct StateTensor {
  std::string_view name;  ///< PyTorch's: "exp_avg", "exp_avg_sq", "momentum_buffer"; or
                          ///< bitsandbytes': "state1", "absmax1", "state2", "absmax2".
  DType dtype = DType::kF32;
  std::span<std::byte> values;     ///< In the memory of the optimizer's Compute.
  int64_t elements_per_value = 1;  ///< Of the shard; above 1 for scales of blocks.
  int64_t begin = 0;               ///< First element of the shard.
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

  /// All state by name, for checkpoints: read it, or write what was saved into it. A name may occur
  /// several times, for different elements of the shard.
  virtual std::span<const StateTensor> state_tensors() = 0;
};

/// Bytes of optimizer state of a shard (parameter, master and gradient not included), for the
/// memory plan: what make_optimizer() with the same arguments allocates. Throws ConfigError when it
/// overflows.
int64_t state_bytes(const OptimizerOptions& options, int64_t numel,
                    std::span<const GroupSegment> segments = {});

/// Makes the optimizer of a shard of `numel` elements (0 is legal), whose arrays and state are
/// memory of `compute`, which outlives it.
///
/// `segments` are all that any update will name; only 8-bit AdamW needs them: it has state for
/// these elements alone, and chooses its precision by parameter. Without them the shard is one
/// parameter. Throws ConfigError (options), HostResourceError or DeviceMemoryError.
std::unique_ptr<ShardOptimizer> make_optimizer(const OptimizerOptions& options, int64_t numel,
                                               std::span<const GroupSegment> segments = {},
                                               kernels::Compute& compute = kernels::host_compute());

}  // namespace fsdp::optim
