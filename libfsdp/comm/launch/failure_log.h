// The failures that a launcher has seen, and which of them was the first cause.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "libfsdp/comm/control/control.h"
#include "libfsdp/comm/control/rank_state.h"
#include "libfsdp/comm/control/report.h"

namespace fsdp::comm {

struct Failure {
  int rank = 0;
  int code = 1;              ///< Exit code for the whole.
  bool consequence = false;  ///< Some other rank's failure may be the cause.
  int64_t at_ns = 0;         ///< Of the monotonic clock.
  std::string text;          ///< Continues "name: rank 1".
  /// The rank's own words are about options, files or numbers: what the others did is no matter.
  bool concerns_it_alone = false;
};

/// Note [First cause] When one rank fails, others fail because of it, in any order as seen from
/// here, and sometimes in ways that look like a failure of their own (a crash while they end). The
/// control memory says who was missed by the first rank that gave up, or who that was. A failure of
/// that rank is the cause; else the earliest one that is no consequence and was there before any
/// rank gave up; else what the rank says that gave up first.
class FailureLog {
 public:
  void add(const ControlView& control, Failure failure);
  /// Notes that `rank` ended in order, with exit code 0.
  void ended_in_order(int rank) { ended_in_order_.push_back(rank); }
  bool empty() const { return failures_.empty(); }
  bool only_consequences() const;

  /// The first cause; none if there is no failure.
  std::optional<Failure> cause(const ControlView& control) const;
  /// "\n  rank 0: ..." for all ranks but `failed`, as they were when the first failure was seen;
  /// empty for a failure that has nothing to do with them.
  std::string others(const Failure& failed) const;

 private:
  const Failure* first(bool consequence, int rank) const;
  Failure told_by_others(const ControlView& control, Failure told) const;

  std::vector<Failure> failures_;
  std::vector<RankState> states_;
  std::vector<int> ended_in_order_;
};

/// The failure that a rank reports, with what it was doing.
Failure failure_of(const ControlView& control, int rank, const FailureReport& report);

}  // namespace fsdp::comm
