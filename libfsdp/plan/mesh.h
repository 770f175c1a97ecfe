// Ranks arranged on two axes: replicas hold equal shards, the shard axis divides the parameters.
#pragma once

#include <vector>

namespace fsdp::plan {

/// `replicate` x `shard` ranks; rank = replica * shard + position. Axis sizes are at least 1.
struct Mesh {
  int replicate = 1;
  int shard = 1;

  int size() const { return replicate * shard; }
  /// Which part of every bucket `rank` owns, in [0, shard).
  int shard_coordinate(int rank) const { return rank % shard; }
  int replicate_coordinate(int rank) const { return rank / shard; }
  /// Ranks that together hold one copy of the parameters, ascending; contains `rank`.
  std::vector<int> shard_group(int rank) const;
  /// Ranks that own the same part as `rank`, one of each replica, ascending; contains `rank`.
  std::vector<int> replica_group(int rank) const;
  /// All ranks, ascending: gradients are always summed over all of them, in rank order.
  std::vector<int> world() const;
};

}  // namespace fsdp::plan
