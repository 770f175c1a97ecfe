// What has a state, as files see it: tensors of which each rank holds a part, and small values.
//
// Everything that is saved (a sharded model, its optimizer, a user's object) is described by a
// StateDict; every format (full, sharded) is written from one and read into one. A description
// holds no data: parts are read and written piece by piece, wherever they lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "libfsdp/base/dtype.h"

namespace fsdp::checkpoint {

/// One tensor, and the contiguous piece of it (flattened, row-major) that this rank holds.
struct TensorPart {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;  ///< Of the whole tensor; empty = a scalar.
  int64_t at = 0;              ///< First element of this rank's piece.
  int64_t numel = 0;           ///< Of the piece; 0 = this rank holds nothing of it.
  /// Whether this rank saves its piece: of equal pieces on several ranks (replicas) one does.
  bool saved = true;
  /// Elements [offset, offset + bytes / element size) of the piece, in `dtype`, to and from host
  /// memory. May throw; called by one thread at a time, in any order.
  std::function<void(int64_t offset, std::span<std::byte> to)> read;
  std::function<void(int64_t offset, std::span<const std::byte> from)> write;
  /// The piece where it lies in host memory, if `read` only copies from there, and if `write` only
  /// copies to there; they save those copies. Else empty.
  std::span<const std::byte> source = {};
  std::span<std::byte> target = {};
};

/// Every rank lists the same tensors in the same order, also those of which it holds nothing. The
/// saved pieces of all ranks cover each tensor exactly once; the pieces to be loaded may overlap.
struct StateDict {
  std::vector<TensorPart> tensors;
};

}  // namespace fsdp::checkpoint
