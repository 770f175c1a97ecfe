#include "libfsdp/comm/control/control.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/os/mapping.h"

namespace fsdp::comm {
namespace {

// Holds a fingerprint of the layout, so that ranks of different builds refuse each other.
constexpr uint64_t kMagic = 0x66736470'0001'0000ULL + sizeof(RankControl);
constexpr size_t kRanksAt = (sizeof(WorldControl) + 4095) / 4096 * 4096;

static_assert(std::atomic<Presence>::is_always_lock_free &&
              std::atomic<int64_t>::is_always_lock_free);

size_t staging_at(int size) { return whole_pages(kRanksAt + sizeof(RankControl) * size); }

}  // namespace

int64_t monotonic_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

size_t ControlView::bytes(int size) { return staging_at(size) + 2 * kStagingBytes * size; }

ControlView ControlView::create(std::byte* data, int size) {
  check(size >= 1 && size <= kMaxRanks, cat("a world of ", size, " ranks on one host"));
  auto* world = new (data) WorldControl;
  for (int rank = 0; rank < size; ++rank)
    new (data + kRanksAt + sizeof(RankControl) * rank) RankControl;
  world->size = size;
  world->magic = kMagic;
  return ControlView(data);
}

ControlView ControlView::open(std::byte* data, size_t bytes) {
  ControlView view(data);
  if (bytes < kRanksAt || view.world().magic != kMagic || view.size() < 1 ||
      view.size() > kMaxRanks || bytes < ControlView::bytes(view.size())) {
    throw CommError(
        "[comm] the ranks' control memory has another layout; are all ranks the same program?");
  }
  return view;
}

RankControl& ControlView::rank(int rank) const {
  return *reinterpret_cast<RankControl*>(data_ + kRanksAt + sizeof(RankControl) * rank);
}

std::byte* ControlView::staging(int rank, int half) const {
  return data_ + staging_at(size()) + kStagingBytes * (2 * rank + half);
}

void ControlView::abort(int rank, std::string_view text, int lost) const noexcept {
  uint32_t none = 0;
  if (world().abort_state.compare_exchange_strong(none, 1)) {
    const size_t length = std::min(text.size(), sizeof(WorldControl::abort_text) - 1);
    std::memcpy(world().abort_text, text.data(), length);
    world().abort_text[length] = '\0';
    world().abort_rank = rank;
    world().abort_lost = lost;
    world().abort_state.store(2, std::memory_order_release);
  }
  for (int peer = 0; peer < size(); ++peer) {
    this->rank(peer).begun.wake();
    this->rank(peer).finished.wake();
  }
}

std::string ControlView::abort_text() const {
  const uint32_t state = world().abort_state.load(std::memory_order_acquire);
  if (state == 0) return {};
  if (state == 1) return "a rank failed";  // Its text is on the way, or it died while writing it.
  return cat("rank ", world().abort_rank, " failed: ", world().abort_text);
}

int ControlView::abort_rank() const {
  return world().abort_state.load(std::memory_order_acquire) == 2 ? world().abort_rank : -1;
}

int ControlView::abort_lost() const {
  return world().abort_state.load(std::memory_order_acquire) == 2 ? world().abort_lost : -1;
}

void ControlView::set_progress(int rank, int64_t step, std::string_view phase) const {
  uint64_t words[2] = {};
  std::memcpy(words, phase.data(), std::min(phase.size(), sizeof(words)));
  RankControl& mine = this->rank(rank);
  mine.step.store(step, std::memory_order_relaxed);
  mine.phase[0].store(words[0], std::memory_order_relaxed);
  mine.phase[1].store(words[1], std::memory_order_relaxed);
}

std::string ControlView::progress(int rank) const {
  const RankControl& of = this->rank(rank);
  const int64_t step = of.step.load(std::memory_order_relaxed);
  const uint64_t words[2] = {of.phase[0].load(std::memory_order_relaxed),
                             of.phase[1].load(std::memory_order_relaxed)};
  char phase[sizeof(words) + 1] = {};
  std::memcpy(phase, words, sizeof(words));
  std::string text;
  if (step >= 0) text += cat("step ", step);
  if (phase[0] != '\0') text += cat(text.empty() ? "" : ", ", "phase ", phase);
  return text;
}

void ControlView::set_waiting(int rank, int member, uint64_t sequence) const {
  Waiting& waiting = this->rank(rank).waiting;
  waiting.sequence.store(sequence, std::memory_order_relaxed);
  waiting.since_ns.store(monotonic_ns(), std::memory_order_relaxed);
  waiting.member.store(member + 1, std::memory_order_release);
}

void ControlView::name_units(std::span<const std::string> names) const {
  const auto count = static_cast<int32_t>(std::min(names.size(), kMaxUnitNames));
  const int32_t before = world().num_unit_names.load(std::memory_order_relaxed);
  bool differ = before != 0 && before != count;
  for (int32_t i = 0; i < count && !differ; ++i) {
    std::string_view name = names[static_cast<size_t>(i)];
    if (name.size() >= kUnitNameBytes) name.remove_prefix(name.size() - kUnitNameBytes + 1);
    char* stored = world().unit_names[i];
    if (before == 0) std::memcpy(stored, name.data(), name.size());
    differ = name != stored;
  }
  world().num_unit_names.store(differ ? -1 : count, std::memory_order_release);
}

std::string_view ControlView::unit_name(int32_t unit) const {
  const int32_t known = world().num_unit_names.load(std::memory_order_acquire);
  return unit >= 0 && unit < known ? world().unit_names[unit] : std::string_view();
}

}  // namespace fsdp::comm
