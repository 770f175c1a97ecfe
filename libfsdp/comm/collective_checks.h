// What every transport checks before a collective begins. The texts are made only when they are
// needed: collectives do not touch the heap.
#pragma once

#include <algorithm>
#include <span>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/communicator.h"

namespace fsdp::comm {

/// check() with the text in parts.
template <class... Parts>
void require(bool condition, const Parts&... text) {
  if (!condition) [[unlikely]]
    throw InternalError(cat("internal error: ", text...));
}

/// A group is ascending and contains this rank.
inline void require_member(const Group& group, int rank) {
  require(std::binary_search(group.begin(), group.end(), rank),
          "a collective's group does not contain this rank");
}

/// A collective's source lies within its block.
inline void require_source(const SymmetricSpan& span) {
  const size_t bytes = span.memory->bytes();
  require(span.offset <= bytes && span.bytes <= bytes - span.offset, "source [", span.offset, ", +",
          span.bytes, ") of a block of ", bytes, " bytes");
}

/// A fold's part lies within its source.
inline void require_part(const SymmetricSpan& source, DType dtype, int64_t begin,
                         std::span<float> part) {
  const auto numel = static_cast<int64_t>(source.bytes / dtype_bytes(dtype));
  require(begin >= 0 && begin <= numel && static_cast<int64_t>(part.size()) <= numel - begin,
          "fold of elements [", begin, ", +", part.size(), ") of ", numel);
}

/// The root of a broadcast is a rank.
inline void require_root(int root, int size) {
  require(root >= 0 && root < size, "broadcast from rank ", root, " in a world of ", size);
}

}  // namespace fsdp::comm
