// What ranks are doing, as the control memory tells it, and as text for people.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "libfsdp/comm/control/control.h"

namespace fsdp::comm {

/// One rank at one moment.
struct RankState {
  int rank = 0;
  Presence presence = Presence::kAbsent;
  int64_t step = -1;  ///< -1 = unknown.
  std::string phase;
  std::string computes;  ///< "unit 'layers.3'", or empty.
  int waits_for = -1;    ///< A rank, -1 = it computes.
  std::string waits_in;  ///< "reduce of unit 'layers.3'"
  double waited_s = 0;
  std::string last;  ///< The collective that it began last, or empty.
};

/// Reads without any lock: a rank that runs on meanwhile may be seen between two moments.
RankState look_at(const ControlView& control, int rank);

/// "step 7, backward, waits for rank 1 in reduce of unit 'layers.3' (1.2 s)": for a line of its
/// own.
std::string describe(const RankState& state);
/// " at step 7, phase backward, while it waited for rank 0 in reduce of unit 'layers.3'": continues
/// a sentence about the rank's end. Empty when nothing is known.
std::string describe_end(const RankState& state);

/// Begins the part of a text that lists all ranks.
inline constexpr std::string_view kStatesTitle = "what the other ranks were doing:";
/// One line "\n  rank 0: ..." for each rank but those in `without`.
std::string describe_others(const ControlView& control, const std::vector<int>& without);

/// Who keeps `member` waiting, however many ranks stand between: `member` itself if it computes.
/// `self` is the asking rank; where the chain comes back to it, nobody else is to blame: `member`.
int end_of_waits(const ControlView& control, int member, int self);

}  // namespace fsdp::comm
