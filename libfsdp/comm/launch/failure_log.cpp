#include "libfsdp/comm/launch/failure_log.h"

#include <algorithm>
#include <array>

#include "libfsdp/base/error.h"

namespace fsdp::comm {
namespace {

// What a person mends in options, files or numbers, whatever the other ranks were doing.
bool concerns_it_alone(int code) {
  constexpr std::array kOwn = {ExitCode::kConfig, ExitCode::kData, ExitCode::kModel,
                               ExitCode::kDoesNotFit, ExitCode::kNumerics};
  return std::find(kOwn.begin(), kOwn.end(), static_cast<ExitCode>(code)) != kOwn.end();
}

// The cause is one line, the last one, for people and for scripts.
std::string one_line(std::string_view text) {
  std::string line;
  for (const char c : text) {
    const bool space = c == '\n' || c == '\r' || c == '\t' || c == ' ';
    if (!space) line += c;
    if (space && !line.empty() && line.back() != ' ') line += ' ';
  }
  while (!line.empty() && line.back() == ' ') line.pop_back();
  return line;
}

// Without the list of ranks, which the launcher makes itself.
std::string_view without_states(std::string_view text) {
  return text.substr(0, text.find(kStatesTitle));
}

}  // namespace

Failure failure_of(const ControlView& control, int rank, const FailureReport& report) {
  std::string doing = control.progress(rank);
  const bool alone = concerns_it_alone(report.code);
  if (!report.consequence && !alone) {
    doing = describe_end(look_at(control, rank));
    doing.erase(0, doing.starts_with(" at ") ? 4 : 1);
    if (!doing.empty() && !control.progress(rank).empty()) doing.insert(0, "at ");
  } else if (!doing.empty()) {
    doing.insert(0, "at ");
  }
  return {.rank = rank,
          .code = report.code,
          .consequence = report.consequence,
          .at_ns = report.at_ns,
          .text = cat(": ", one_line(without_states(report.text)),
                      doing.empty() ? "" : cat(" (", doing, ")")),
          .concerns_it_alone = alone};
}

void FailureLog::add(const ControlView& control, Failure failure) {
  for (int rank = 0; failures_.empty() && rank < control.size(); ++rank)
    states_.push_back(look_at(control, rank));
  failures_.push_back(std::move(failure));
}

bool FailureLog::only_consequences() const { return first(false, -1) == nullptr; }

/// The earliest; rank -1 = of any rank.
const Failure* FailureLog::first(bool consequence, int rank) const {
  const Failure* found = nullptr;
  for (const Failure& one : failures_) {
    if (one.consequence != consequence || (rank >= 0 && one.rank != rank)) continue;
    if (found == nullptr || one.at_ns < found->at_ns) found = &one;
  }
  return found;
}

std::optional<Failure> FailureLog::cause(const ControlView& control) const {
  if (failures_.empty()) return std::nullopt;
  const int suspect = control.abort_lost() >= 0 ? control.abort_lost() : control.abort_rank();
  if (suspect >= 0) {
    if (const Failure* of_suspect = first(false, suspect)) return *of_suspect;
  }
  const Failure* own = first(false, -1);
  const Failure* consequence = first(true, -1);
  if (consequence == nullptr || (own != nullptr && own->at_ns <= consequence->at_ns)) return *own;
  return told_by_others(control, *consequence);
}

// Nobody but the others can tell of a rank that ended as if all were well, or that never came.
Failure FailureLog::told_by_others(const ControlView& control, Failure told) const {
  const int lost = control.abort_lost();
  if (lost < 0) return told;
  const std::string text = one_line(without_states(control.world().abort_text));
  const std::string head = cat("[comm] rank ", lost);
  if (!text.starts_with(head)) return told;
  const bool ended = std::count(ended_in_order_.begin(), ended_in_order_.end(), lost) != 0;
  const size_t who_waited = text.find("; rank ");
  told.rank = lost;
  told.text = text.substr(head.size());
  if (ended && who_waited != std::string::npos) {
    told.text = cat(" ended with exit code 0", describe_end(look_at(control, lost)),
                    text.substr(who_waited, text.find(" (rank ", who_waited) - who_waited));
  }
  return told;
}

std::string FailureLog::others(const Failure& failed) const {
  std::string text;
  for (const RankState& state : states_) {
    if (failed.concerns_it_alone || state.rank == failed.rank) continue;
    text += cat("\n  rank ", state.rank, ": ", describe(state));
  }
  return text;
}

}  // namespace fsdp::comm
