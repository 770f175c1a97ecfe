#include "libfsdp/gloo/peer_failures.h"

#include <algorithm>
#include <chrono>

#include "libfsdp/base/error.h"

namespace fsdp::gloo {
namespace {

// A longer time between two looks means that this process itself was stopped: that does not count.
constexpr double kLongestLookSeconds = 0.2;

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

PeerFailures::PeerFailures(int size)
    : lost_(static_cast<size_t>(size)), left_at_(static_cast<size_t>(size), UINT64_MAX) {}

void PeerFailures::fail(const std::string& text) {
  const std::lock_guard lock(mutex_);
  if (failed_.empty()) failed_ = text;
  wake_if_hopeless();
}

bool PeerFailures::failed() {
  const std::lock_guard lock(mutex_);
  return !failed_.empty();
}

void PeerFailures::throw_if_failed() {
  const std::lock_guard lock(mutex_);
  if (!failed_.empty()) throw CommError(failed_);
}

void PeerFailures::note_lost(int rank, const std::string& why) {
  const std::lock_guard lock(mutex_);
  std::string& known = lost_[static_cast<size_t>(rank)];
  if (known.empty()) known = why;
  wake_if_hopeless();
}

void PeerFailures::note_left(int rank, uint64_t begun) {
  const std::lock_guard lock(mutex_);
  left_at_[static_cast<size_t>(rank)] = begun;
  wake_if_hopeless();
}

bool PeerFailures::is_hopeless(int rank, uint64_t sequence) {
  const std::lock_guard lock(mutex_);
  return hopeless(rank, sequence);
}

std::string PeerFailures::known() {
  const std::lock_guard lock(mutex_);
  if (!failed_.empty()) return failed_;
  for (size_t rank = 0; rank < lost_.size(); ++rank) {
    if (!lost_[rank].empty() || left_at_[rank] != UINT64_MAX)
      return cat("rank ", rank, " ", reason(rank));
  }
  return {};
}

std::string PeerFailures::why_lost(int rank) {
  const std::lock_guard lock(mutex_);
  return reason(static_cast<size_t>(rank));
}

bool PeerFailures::wait(Transfer& transfer, int member, uint64_t sequence, const comm::Tag& what) {
  {
    const std::lock_guard lock(mutex_);
    wait_ = {.member = member, .sequence = sequence, .what = what};
    looked_ = seconds_now();
    waiting_ = &transfer;
    wake_if_hopeless();
  }
  const auto done_waiting = [this] {
    const std::lock_guard lock(mutex_);
    waiting_ = nullptr;
  };
  try {
    const bool done = transfer.wait();
    done_waiting();
    return done;
  } catch (...) {
    done_waiting();
    throw;
  }
}

std::optional<PeerFailures::Wait> PeerFailures::look() {
  const std::lock_guard lock(mutex_);
  if (waiting_ == nullptr) return std::nullopt;
  const double now = seconds_now();
  wait_.waited_s += std::min(now - looked_, kLongestLookSeconds);
  looked_ = now;
  return wait_;
}

}  // namespace fsdp::gloo
