#include "libfsdp/comm/fold_parts.h"

#include <algorithm>

namespace fsdp::comm {

FoldTiles tiles_of(const Group& group, const std::vector<FoldPart>& parts, int64_t numel,
                   int rank) {
  const int64_t count = parts.front().count;
  if (count == 0 || numel % count != 0) return {};
  std::vector<Group> owners(static_cast<size_t>(numel / count));
  int64_t own_tile = -1;
  for (size_t member = 0; member < group.size(); ++member) {
    const FoldPart& part = parts[member];
    if (part.count != count || part.begin % count != 0) return {};
    owners[static_cast<size_t>(part.begin / count)].push_back(group[member]);
    if (group[member] == rank) own_tile = part.begin / count;
  }
  const size_t copies = owners.front().size();
  const Group& replicas = owners[static_cast<size_t>(own_tile)];
  const auto copy =
      static_cast<size_t>(std::find(replicas.begin(), replicas.end(), rank) - replicas.begin());
  FoldTiles tiles{.scatter = {}, .replicas = replicas};
  for (const Group& owner : owners) {
    if (owner.size() != copies) return {};
    // NCCL gives the i-th member the i-th part.
    for (size_t c = 0; c < copies; ++c) {
      const Group* before = &owner == owners.data() ? nullptr : &owner - 1;
      if (before && (*before)[c] >= owner[c]) return {};
    }
    tiles.scatter.push_back(owner[copy]);
  }
  return tiles;
}

}  // namespace fsdp::comm
