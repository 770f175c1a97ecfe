#include "libfsdp/comm/launch/rank_health.h"

#include "libfsdp/base/error.h"
#include "libfsdp/comm/launch/child_process.h"

namespace fsdp::comm {

void RankHealth::look(pid_t pid, const RankControl& control, double elapsed_s) {
  stopped_s_ += stopped_by_ != 0 ? elapsed_s : 0;
  while (const std::optional<int> news = stop_or_continue_of_child(pid)) {
    stopped_by_ = *news;
    stopped_s_ = 0;
  }
  const uint64_t heartbeat = control.heartbeat.load(std::memory_order_relaxed);
  const bool beats = control.presence.load(std::memory_order_acquire) == Presence::kJoined;
  still_s_ = beats && heartbeat == heartbeat_ && stopped_by_ == 0 ? still_s_ + elapsed_s : 0;
  heartbeat_ = heartbeat;
}

std::string RankHealth::complaint(double limit_s) const {
  if (stopped_s_ > limit_s)
    return cat(" was stopped by ", signal_name(stopped_by_), " for ", limit_s, " s");
  if (still_s_ > limit_s)
    return cat(" has shown no sign of life for ", limit_s, " s (frozen, or stuck in the kernel)");
  return {};
}

}  // namespace fsdp::comm
