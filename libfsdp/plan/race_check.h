// An independent proof that a schedule is safe on any number of ranks.
#pragma once

#include <string>
#include <vector>

#include "libfsdp/plan/schedule.h"

namespace fsdp::plan {

/// Two conflicting accesses that nothing orders, or one that finds wrong contents.
struct Race {
  int first_op = 0;
  int second_op = 0;
  int first_rank = 0;
  int second_rank = 0;
  bool next_step = false;  ///< second_op belongs to the step after first_op's.
  Access access;           ///< The buffer fought for, as second_op uses it.
  int owner_rank = 0;      ///< Whose buffer.
  std::string reason;      ///< What is wrong, for people.

  std::string to_string(const Schedule& schedule) const;
};

/// Races of `schedule` run for three steps in a row on `ranks` ranks (empty = safe), one for each
/// pair of operations and buffer. Where one race makes others follow, only the first is sure to be
/// listed.
///
/// Builds happens-before by vector clocks from stream order, the operations' dependencies and the
/// meaning of a collective (nobody's finish before everybody's begin), and nothing else; it shares
/// no code with the compiler. When every access is ordered it also follows the contents: a slot
/// must hold the parameters of the unit that reads it, gathered in this step from shards of the
/// step before; each gradient must be reduced once before its slot is reused and before the packet;
/// the optimizer comes after the packet. The order of the mesh's axes is the schedule's; `ranks`
/// must be a multiple of mesh.replicate (ConfigError). Cost: O(ops x ranks^2).
std::vector<Race> find_races(const Schedule& schedule, int ranks);

}  // namespace fsdp::plan
