// The optimizers of one rank's shards, one for each trainable bucket, and what a step does with
// them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "libfsdp/engine/step_packet.h"
#include "libfsdp/engine/step_plans.h"
#include "libfsdp/engine/storage.h"
#include "libfsdp/optim/clip.h"
#include "libfsdp/optim/optimizer.h"

namespace fsdp::engine {

/// Bytes of optimizer state on the rank of a shard group that has most: where parameters of few
/// elements have state of another form (8-bit AdamW), ranks differ.
int64_t optimizer_bytes(const plan::Layout& layout, const optim::OptimizerOptions& options);

/// Gradient shards hold sums over all tokens. Methods that take `has_gradient` (by unit, of
/// StepPlan) leave out units that were not reduced in this step.
class ShardOptimizers {
 public:
  /// `storage` outlives this. ParamSpec::group is an index into `groups`.
  ShardOptimizers(Storage& storage, const plan::Mesh& mesh, int rank,
                  const optim::OptimizerOptions& options, std::vector<optim::ParamGroup> groups,
                  uint64_t seed);

  /// Of a trainable bucket.
  optim::ShardOptimizer& of(int bucket) { return *optimizers_.at(static_cast<size_t>(bucket)); }

  /// Of this rank's gradient shards; zero where another replica counts the same.
  kernels::GradientSums sum_gradients(optim::NormType type,
                                      const std::vector<uint8_t>& has_gradient);
  /// Updates the parameters that some rank used in this step. `updates`: this one counted.
  void update(const StepPacket& packet, const std::vector<uint8_t>& has_gradient,
              const optim::ClipDecision& decision, double learning_rate, int64_t updates);

  /// Around an update by somebody else: makes gradients those of the mean loss, clipped; and lets
  /// what the model computes with follow the masters.
  void scale_gradients(const optim::ClipDecision& decision);
  void refresh_copies();

 private:
  optim::BucketView view_of(int bucket);

  Storage& storage_;
  bool first_replica_;
  std::vector<optim::ParamGroup> groups_;
  uint64_t seed_;
  std::vector<plan::ShardSlice> slices_;                            // Of this rank.
  std::vector<std::vector<optim::GroupSegment>> segments_;          // By bucket: of this rank.
  std::vector<std::unique_ptr<optim::ShardOptimizer>> optimizers_;  // By bucket; null when frozen.
  std::vector<optim::GroupSegment> used_segments_;  // Of the bucket that is being updated.
  std::vector<std::span<const float>> summed_;      // Gradient shards that count in the norm.
};

}  // namespace fsdp::engine
