// An independent proof that a schedule is safe on any number of ranks.
#pragma once

#include <string>
#include <vector>

#include "libfsdp/plan/schedule.h"

namespace fsdp::plan {

/// Two conflicting accesses that nothing orders.
struct Race {
  int first_op = 0;
  int second_op = 0;
  int first_rank = 0;
  int second_rank = 0;
  bool next_step = false;  ///< second_op belongs to the step after first_op's.
  Access access;           ///< The buffer fought for, as second_op uses it.
  int owner_rank = 0;      ///< Whose buffer.

  std::string to_string(const Schedule& schedule) const;
};

/// All races of `schedule` run for three steps in a row on `ranks` ranks (empty = safe).
///
/// Builds happens-before by vector clocks from stream order, the operations' dependencies and the
/// meaning of a collective (nobody's finish before everybody's begin), and nothing else; it shares
/// no code with the compiler. Also reports reads of a slot that holds another unit's parameters, or
/// none, as a race with the last writer. Cost: O(ops x ranks^2).
std::vector<Race> find_races(const Schedule& schedule, int ranks);

}  // namespace fsdp::plan
