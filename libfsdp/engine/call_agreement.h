// What the ranks tell each other when none of them has a schedule: which units their models have
// called.
#pragma once

#include <cstdint>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/plan/layout.h"
#include "libfsdp/plan/schedule.h"

namespace fsdp::engine {

/// Of one rank, in the micro-batch that is under way.
struct RankCalls {
  std::vector<plan::Call> calls;  ///< Empty: it has no data.
  int64_t micro_batches = 0;      ///< Of the step.
  int64_t trainable_tokens = 0;   ///< Of the micro-batch.
};

struct AgreedCalls {
  std::vector<plan::Call> calls;
  /// About the trainable tokens of the step over all ranks: those of the first micro-batch, which
  /// is the same one at any number of ranks, times the number of micro-batches.
  int64_t expected_tokens = 0;
};

/// Collective over the world. Ranks without data take the others' calls; throws CommError, naming
/// two ranks and their first different call, when the others' differ.
AgreedCalls agree_on_calls(comm::Communicator& comm, const plan::Layout& layout,
                           const RankCalls& mine, int64_t step);

/// "unit 'layers.3'", or "the model" for the root.
std::string unit_text(const plan::Layout& layout, int unit);

}  // namespace fsdp::engine
