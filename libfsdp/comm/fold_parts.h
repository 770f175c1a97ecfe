// How a fold's parts lie, as all its members know them.
#pragma once

#include <cstdint>
#include <vector>

#include "libfsdp/comm/communicator.h"

namespace fsdp::comm {

/// Elements [begin, begin + count) of a fold's source that one member wants.
struct FoldPart {
  int64_t begin = 0;
  int64_t count = 0;
  bool operator==(const FoldPart&) const = default;
};

/// A fold as scatters within groups whose members have different parts, then sums over the ranks
/// with equal parts. Both as ranks of the world.
struct FoldTiles {
  Group scatter;
  Group replicas;
};

/// The tiles for `rank`, where the parts (by member) are equally large, cover `numel` elements
/// without overlap, each wanted by as many members, in the order of ranks; else empty groups.
FoldTiles tiles_of(const Group& group, const std::vector<FoldPart>& parts, int64_t numel, int rank);

}  // namespace fsdp::comm
