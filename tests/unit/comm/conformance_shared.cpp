#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "libfsdp/base/error.h"
#include "tests/unit/comm/conformance_cases.h"

namespace fsdp::comm {
namespace {

/// Partitions of the world as `rank` sees them: all, alone, neighbours, even and odd.
std::vector<Group> groups_of(const Communicator& c) {
  Group pair{c.rank() - c.rank() % 2};
  if (pair[0] + 1 < c.size()) pair.push_back(pair[0] + 1);
  Group alternate;
  for (int r = c.rank() % 2; r < c.size(); r += 2) alternate.push_back(r);
  return {c.world(), Group{c.rank()}, pair, alternate};
}

void a_shared_block_is_held_once(Communicator& c) {
  for (const Group& group : groups_of(c)) {
    if (!c.can_share(group)) continue;
    constexpr size_t kWords = 1024;
    const auto block = c.allocate_shared(group, kWords * sizeof(int) * c.size(), "weights");
    auto* words = reinterpret_cast<int*>(block->data());
    const size_t own =
        kWords * (std::lower_bound(group.begin(), group.end(), c.rank()) - group.begin());
    for (int round = 1; round <= 50; ++round) {
      std::fill_n(words + own, kWords, 1000 * c.rank() + round);
      if ((round + c.rank()) % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
      c.finish(c.begin_fence(group, make_tag("written", round)));
      for (size_t i = 0; i < kWords * group.size(); ++i) {
        expect(words[i] == 1000 * group[i / kWords] + round, cat("word ", i, ", round ", round));
      }
      c.finish(c.begin_fence(group, make_tag("read", round)));
    }
  }
}

void a_shared_block_is_zero_and_aligned(Communicator& c) {
  if (!c.can_share(c.world())) return;
  for (const size_t bytes : {0UL, 1UL, 5000UL, 3UL << 20}) {
    auto block = c.allocate_shared(c.world(), bytes, "block");
    expect(block->bytes() == bytes, "size");
    expect(reinterpret_cast<uintptr_t>(block->data()) % 4096 == 0, "alignment");
    const bool zero = std::all_of(block->data(), block->data() + bytes,
                                  [](std::byte b) { return b == std::byte{0}; });
    c.wait_released(c.begin_fence(c.world(), make_tag("looked at")));
    if (c.rank() == 0) std::memset(block->data(), 0xff, bytes);
    expect(zero, "zero at first");
  }
}

void a_released_fence_was_seen_by_all(Communicator& c) {
  if (!c.can_share(c.world())) return;
  const auto block = c.allocate_shared(c.world(), sizeof(int) * c.size(), "counters");
  auto* counters = reinterpret_cast<int*>(block->data());
  for (int round = 1; round <= 100; ++round) {
    counters[c.rank()] = round;
    const Ticket written = c.begin_fence(c.world(), make_tag("written", round));
    if ((round + c.rank()) % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
    c.finish(written);
    for (int r = 0; r < c.size(); ++r)
      expect(counters[r] == round, cat("rank ", r, " in round ", round));
    // The finish of this one says that the values were read.
    c.wait_released(c.begin_fence(c.world(), make_tag("read", round)));
  }
}

void fences_mix_with_other_collectives(Communicator& c) {
  const auto memory = c.allocate(sizeof(float) * 100, "gradients");
  auto* mine = reinterpret_cast<float*>(memory->local());
  for (int round = 0; round < 50; ++round) {
    std::vector<Ticket> fences;
    float sums[30] = {};
    for (int i = 0; i < 30; ++i) {
      mine[i] = static_cast<float>(c.rank() + i + round);
      fences.push_back(c.begin_fence(c.world(), make_tag("fence", round, i)));
      const SymmetricSpan source{memory.get(), sizeof(float) * i, sizeof(float)};
      c.begin_fold(c.world(), source, DType::kF32, 0, {&sums[i], 1}, false,
                   make_tag("fold", round, i));
    }
    const Ticket last = c.begin_fence(c.world(), make_tag("last", round));
    for (const Ticket fence : fences) c.wait_released(fence);
    c.wait_released(last);
    const int n = c.size();
    for (int i = 0; i < 30; ++i) {
      expect(sums[i] == static_cast<float>(n * (i + round) + n * (n - 1) / 2), cat("sum ", i));
    }
  }
}

void too_large_a_shared_block_is_refused_on_all(Communicator& c) {
  if (!c.can_share(c.world())) return;
  std::string text;
  try {
    c.allocate_shared(c.world(), size_t{1} << 60, "parameters");
  } catch (const HostResourceError& e) {
    text = e.what();
  }
  expect(text.find("'parameters'") != std::string::npos, cat("'", text, "' names the label"));
  expect(text.find("rank 0: [comm] cannot") != std::string::npos, cat("'", text, "': rank 0"));
  expect(c.allocate_shared(c.world(), 100, "small")->bytes() == 100, "still usable");
}

void groups_that_differ_are_an_error(Communicator& c) {
  if (!c.can_share(c.world())) return;
  std::string text;
  try {
    c.allocate_shared(c.rank() == 1 ? Group{1} : c.world(), 100, "weights");
    c.barrier(make_tag("afterwards"));
  } catch (const CommError& e) {
    text = e.what();
  }
  for (const char* part : {"differ over who holds 'weights'", "and 1", "{0,1", "{1}"}) {
    expect(text.find(part) != std::string::npos, cat("'", text, "' has '", part, "'"));
  }
}

void what_cannot_be_shared_is_refused(Communicator& c) {
  if (c.can_share(c.world())) return;
  bool refused = false;
  try {
    c.allocate_shared(c.world(), 100, "weights");
  } catch (const InternalError&) {
    refused = true;
  }
  expect(refused, "an InternalError is thrown");
  c.barrier(make_tag("still usable"));
}

}  // namespace

const std::vector<ConformanceCase>& shared_cases() {
  static const std::vector<ConformanceCase> cases = {
      {"ASharedBlockIsHeldOnce", a_shared_block_is_held_once},
      {"ASharedBlockIsZeroAndAligned", a_shared_block_is_zero_and_aligned},
      {"AReleasedFenceWasSeenByAll", a_released_fence_was_seen_by_all},
      {"FencesMixWithOtherCollectives", fences_mix_with_other_collectives},
      {"TooLargeASharedBlockIsRefusedOnAll", too_large_a_shared_block_is_refused_on_all},
      {"GroupsThatDifferAreAnError", groups_that_differ_are_an_error, 2},
      {"WhatCannotBeSharedIsRefused", what_cannot_be_shared_is_refused},
  };
  return cases;
}

}  // namespace fsdp::comm
