// What hub and channels say to each other.
#pragma once

#include <algorithm>
#include <cstdint>

#include "libfsdp/comm/control/control_hub.h"

namespace fsdp::comm::control {

enum Type : uint32_t {
  kStart = 1,  ///< To ranks: all are there.
  kAbort,      ///< Text. From a rank: its failure; to ranks: "rank 1 failed: ...".
  kAlive,      ///< From ranks: SignOfLife. To ranks: empty.
  kLost,       ///< To ranks: int32 rank, text.
  kLeft,       ///< From ranks: SignOfLife. To ranks: int32 rank, uint64 begun.
  kMayGo,      ///< To a rank that left: nobody needs it any more.
  kSet,        ///< From ranks: uint32 key length, key, value.
  kGet,        ///< From ranks: uint64 question, key. Answered when the key is there.
  kHas,        ///< From ranks: uint64 question, key.
  kAdd,        ///< From ranks: uint64 question, int64, key.
  kStates,     ///< From ranks: uint64 question.
  kAnswer,     ///< To a rank: uint64 question, bytes.
};

constexpr size_t kTokenBytes = 120;

/// The first thing on a connection, the only one that is not a frame.
struct Hello {
  uint64_t magic = 0x66736470'0002'0000ULL + sizeof(SignOfLife);
  int32_t rank = 0;
  int32_t size = 0;
  char token[kTokenBytes] = {};
};

/// From one sign of life to the next.
inline double alive_every_s(const CommOptions& options) {
  return std::min(0.25, options.peer_timeout_s / 8);
}

/// Silence is counted in slices of at most that much, so that a process that was itself stopped
/// does not take the others for silent.
inline double longest_slice_s(const CommOptions& options) { return 2 * alive_every_s(options); }

}  // namespace fsdp::comm::control
