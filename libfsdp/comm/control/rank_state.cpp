#include "libfsdp/comm/control/rank_state.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "libfsdp/base/error.h"

namespace fsdp::comm {
namespace {

std::string collective_at(const ControlView& control, int rank, uint64_t sequence) {
  if (sequence == 0) return {};
  const Tag tag = control.rank(rank).ring[sequence % kRing].tag;
  return describe_briefly(tag, control.unit_name(tag.unit));
}

double seconds_since(int64_t since_ns) {
  return std::max(0.0, 1e-9 * static_cast<double>(monotonic_ns() - since_ns));
}

std::string tenths(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", seconds);
  return text;
}

}  // namespace

RankState look_at(const ControlView& control, int rank) {
  const RankControl& of = control.rank(rank);
  RankState state;
  state.rank = rank;
  state.presence = of.presence.load(std::memory_order_acquire);
  state.step = of.step.load(std::memory_order_relaxed);
  const uint64_t phase[2] = {of.phase[0].load(std::memory_order_relaxed),
                             of.phase[1].load(std::memory_order_relaxed)};
  const char* text = reinterpret_cast<const char*>(phase);
  state.phase.assign(text, strnlen(text, sizeof(phase)));
  const int32_t unit = of.unit.load(std::memory_order_relaxed);
  if (unit >= 0) state.computes = unit_text(unit, control.unit_name(unit));
  state.waits_for = of.waiting.member.load(std::memory_order_acquire) - 1;
  if (state.waits_for >= 0) {
    state.waited_s = seconds_since(of.waiting.since_ns.load(std::memory_order_relaxed));
    const uint64_t sequence = of.waiting.sequence.load(std::memory_order_relaxed);
    state.waits_in = collective_at(control, rank, sequence);
  }
  state.last = collective_at(control, rank, of.begun.get());
  return state;
}

std::string describe(const RankState& state) {
  if (state.presence == Presence::kAbsent) return "has not joined yet";
  if (state.presence == Presence::kLeft) return "has left in order";
  std::string text;
  if (state.step >= 0) text += cat("step ", state.step, ", ");
  if (!state.phase.empty()) text += cat(state.phase, ", ");
  if (state.waits_for >= 0) {
    return cat(text, "waits for rank ", state.waits_for, " in ", state.waits_in, " (",
               tenths(state.waited_s), ")");
  }
  text += cat("computes", state.computes.empty() ? "" : " ", state.computes);
  return state.last.empty() ? text : cat(text, " (after ", state.last, ")");
}

std::string describe_end(const RankState& state) {
  if (state.presence == Presence::kAbsent) return " before it joined the others";
  if (state.presence == Presence::kLeft) return " after it had left the others";
  std::string text;
  if (state.step >= 0) text += cat(" at step ", state.step);
  if (!state.phase.empty()) text += cat(text.empty() ? " in " : ", ", "phase ", state.phase);
  if (state.waits_for >= 0) {
    return cat(text, text.empty() ? " " : ", ", "while it waited for rank ", state.waits_for,
               " in ", state.waits_in);
  }
  if (!state.computes.empty()) text += cat(text.empty() ? " in " : ", ", state.computes);
  if (!state.last.empty()) text += cat(text.empty() ? " " : ", ", "after ", state.last);
  return text;
}

std::string describe_others(const ControlView& control, const std::vector<int>& without) {
  std::string text;
  for (int rank = 0; rank < control.size(); ++rank) {
    if (std::find(without.begin(), without.end(), rank) != without.end()) continue;
    text += cat("\n  rank ", rank, ": ", describe(look_at(control, rank)));
  }
  return text;
}

int end_of_waits(const ControlView& control, int member, int self) {
  int end = member;
  for (int hops = 0; hops < control.size(); ++hops) {
    const int next = control.rank(end).waiting.member.load(std::memory_order_acquire) - 1;
    if (next < 0) return end;
    if (next == self) return member;
    end = next;
  }
  return member;
}

}  // namespace fsdp::comm
