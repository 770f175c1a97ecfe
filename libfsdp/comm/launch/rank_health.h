// Whether a rank's process runs, as its launcher sees it.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "libfsdp/comm/control/control.h"

namespace fsdp::comm {

/// Notices a process that is stopped (at once, by the kernel's word) or that shows no sign of life
/// (frozen, or stuck in the kernel). A thread of the process makes the sign, so a rank that
/// computes, or loops for ever, is well.
class RankHealth {
 public:
  /// `elapsed_s` has gone by since the last call, without the time that the launcher itself was
  /// stopped.
  void look(pid_t pid, const RankControl& control, double elapsed_s);
  /// What is wrong for longer than `limit_s`, as the end of a sentence about the rank; empty =
  /// well.
  std::string complaint(double limit_s) const;

 private:
  int stopped_by_ = 0;  // A signal.
  double stopped_s_ = 0;
  uint64_t heartbeat_ = 0;
  double still_s_ = 0;
};

}  // namespace fsdp::comm
