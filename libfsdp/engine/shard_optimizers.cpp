#include "libfsdp/engine/shard_optimizers.h"

#include <algorithm>
#include <limits>
#include <string_view>
#include <utility>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"

namespace fsdp::engine {
namespace {

size_t at(int index) { return static_cast<size_t>(index); }

// FNV-1a: equal on all ranks and in all runs.
uint64_t hash_of(std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (const char c : name) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3ULL;
  return hash;
}

// By bucket.
std::vector<std::vector<optim::GroupSegment>> segments_of(
    const plan::Layout& layout, const std::vector<plan::ShardSlice>& slices) {
  std::vector<std::vector<optim::GroupSegment>> segments(layout.buckets.size());
  for (const plan::ShardSlice& slice : slices) {
    const plan::Bucket& bucket = layout.buckets[at(slice.bucket)];
    const plan::ParamSpec& param = layout.param(bucket, bucket.segments[at(slice.segment)]);
    segments[at(slice.bucket)].push_back({.begin = slice.shard_at,
                                          .end = slice.shard_at + slice.numel,
                                          .group = param.group,
                                          .parameter = hash_of(param.name),
                                          .param_at = slice.param_at,
                                          .param_numel = param.numel()});
  }
  return segments;
}

}  // namespace

int64_t optimizer_bytes(const plan::Layout& layout, const optim::OptimizerOptions& options) {
  int64_t most = 0;
  for (int coordinate = 0; coordinate < layout.mesh.shard; ++coordinate) {
    const auto segments = segments_of(layout, plan::slices_of(layout, coordinate));
    int64_t bytes = 0;
    for (size_t b = 0; b < layout.buckets.size(); ++b) {
      const plan::Bucket& bucket = layout.buckets[b];
      if (!bucket.trainable) continue;
      bytes = checked_add<ConfigError>(
          bytes, optim::state_bytes(options, bucket.shard_numel, segments[b]), "optimizer state");
    }
    most = std::max(most, bytes);
  }
  return most;
}

ShardOptimizers::ShardOptimizers(Storage& storage, const plan::Mesh& mesh, int rank,
                                 const optim::OptimizerOptions& options,
                                 std::vector<optim::ParamGroup> groups, uint64_t seed)
    : storage_(storage),
      first_replica_(mesh.replicate_coordinate(rank) == 0),
      groups_(std::move(groups)),
      seed_(seed),
      slices_(plan::slices_of(storage.layout(), mesh.shard_coordinate(rank))),
      segments_(segments_of(storage.layout(), slices_)) {
  for (size_t b = 0; b < segments_.size(); ++b) {
    const plan::Bucket& bucket = storage.layout().buckets[b];
    optimizers_.push_back(bucket.trainable ? optim::make_optimizer(options, bucket.shard_numel,
                                                                   segments_[b], storage.home())
                                           : nullptr);
  }
  used_segments_.reserve(slices_.size());
  summed_.reserve(segments_.size());
}

kernels::GradientSums ShardOptimizers::sum_gradients(optim::NormType type,
                                                     const std::vector<uint8_t>& has_gradient) {
  // Replicas hold equal sums: each element counts once, on the first replica.
  if (!first_replica_) return {};
  summed_.clear();
  for (size_t b = 0; b < segments_.size(); ++b) {
    const plan::Bucket& bucket = storage_.layout().buckets[b];
    if (bucket.trainable && has_gradient[at(bucket.unit)])
      summed_.push_back(storage_.gradient_shard(static_cast<int>(b)));
  }
  return storage_.home().sum_gradients(summed_, type);
}

optim::BucketView ShardOptimizers::view_of(int index) {
  const plan::Bucket& bucket = storage_.layout().buckets[at(index)];
  std::byte* shard = storage_.shard(index);
  optim::BucketView view{.gradient = storage_.gradient_shard(index).data(),
                         .numel = bucket.shard_numel,
                         .segments = used_segments_,
                         .groups = groups_};
  if (bucket.dtype == DType::kF32) {
    view.master = reinterpret_cast<float*>(shard);
  } else if (float* master = storage_.master(index)) {
    view.master = master;
    view.copy = reinterpret_cast<uint16_t*>(shard);
    view.copy_dtype = bucket.dtype;
  } else {
    view.high = reinterpret_cast<uint16_t*>(shard);
    view.remainder = storage_.remainder(index);
  }
  return view;
}

void ShardOptimizers::update(const StepPacket& packet, const std::vector<uint8_t>& has_gradient,
                             const optim::ClipDecision& decision, double learning_rate,
                             int64_t updates) {
  const optim::UpdateScalars scalars{.learning_rate = learning_rate,
                                     .step = updates,
                                     .gradient_scale = decision.gradient_scale,
                                     .clip_value = decision.clip_value,
                                     .seed = seed_};
  size_t slice = 0;
  for (size_t b = 0; b < segments_.size(); ++b) {
    const int index = static_cast<int>(b);
    const plan::Bucket& bucket = storage_.layout().buckets[b];
    used_segments_.clear();
    for (const optim::GroupSegment& segment : segments_[b]) {
      // A parameter that no rank used in this step is left as it is.
      const bool used = packet.used(index, slices_[slice++].segment);
      if (used && has_gradient[at(bucket.unit)]) used_segments_.push_back(segment);
    }
    if (bucket.trainable) optimizers_[b]->update(view_of(index), scalars);
  }
}

void ShardOptimizers::scale_gradients(const optim::ClipDecision& decision) {
  const auto factor = static_cast<float>(decision.gradient_scale);
  const auto limit = decision.clip_value > 0 ? static_cast<float>(decision.clip_value)
                                             : std::numeric_limits<float>::infinity();
  for (size_t b = 0; b < segments_.size(); ++b) {
    const std::span<float> gradient = storage_.gradient_shard(static_cast<int>(b));
    storage_.home().scale(gradient.data(), static_cast<int64_t>(gradient.size()), factor, limit);
  }
}

void ShardOptimizers::refresh_copies() {
  for (size_t b = 0; b < segments_.size(); ++b) {
    const int index = static_cast<int>(b);
    const plan::Bucket& bucket = storage_.layout().buckets[b];
    if (const float* master = storage_.master(index))
      storage_.home().convert(master, storage_.shard(index), bucket.dtype, bucket.shard_numel);
  }
}

}  // namespace fsdp::engine
