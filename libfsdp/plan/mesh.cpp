#include "libfsdp/plan/mesh.h"

#include <cstddef>
#include <numeric>

namespace fsdp::plan {

std::vector<int> Mesh::shard_group(int rank) const {
  std::vector<int> group(static_cast<size_t>(shard));
  std::iota(group.begin(), group.end(), replicate_coordinate(rank) * shard);
  return group;
}

std::vector<int> Mesh::replica_group(int rank) const {
  std::vector<int> group;
  for (int replica = 0; replica < replicate; ++replica)
    group.push_back(replica * shard + shard_coordinate(rank));
  return group;
}

std::vector<int> Mesh::world() const {
  std::vector<int> group(static_cast<size_t>(size()));
  std::iota(group.begin(), group.end(), 0);
  return group;
}

}  // namespace fsdp::plan
