#include "tests/unit/comm/conformance_cases.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/compute.h"
#include "tests/support/sanitized.h"

namespace fsdp::comm {

void expect(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error("not so: " + what);
}

std::vector<ConformanceCase> all_cases() {
  std::vector<ConformanceCase> all;
  for (const auto* list : {&data_cases(), &shared_cases(), &failure_cases(), &divergence_cases()}) {
    all.insert(all.end(), list->begin(), list->end());
  }
  return all;
}

namespace {

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 31)) * 0x9e3779b97f4a7c15ULL;
  return x ^ (x >> 29);
}

/// A float that each rank can compute for every other; sums of them round, so the order of
/// additions shows.
float value_of(int rank, int64_t i, int64_t salt = 0) {
  const uint64_t bits =
      mix(mix(static_cast<uint64_t>(i) + 1) + mix(static_cast<uint64_t>(rank) * 7919 + salt + 3));
  return (static_cast<float>(bits % 2000003) - 1000001.0F) *
         std::ldexp(1.0F, static_cast<int>(bits >> 60) - 30);
}

std::byte byte_of(int rank, size_t i, uint64_t salt = 0) {
  return static_cast<std::byte>(mix(i + 31 * static_cast<uint64_t>(rank) + 1009 * salt) & 0xff);
}

void fill(std::byte* to, size_t bytes, int rank, uint64_t salt = 0) {
  for (size_t i = 0; i < bytes; ++i) to[i] = byte_of(rank, i, salt);
}

void expect_filled(const std::byte* from, size_t bytes, int rank, uint64_t salt,
                   const std::string& what) {
  for (size_t i = 0; i < bytes; ++i) {
    if (from[i] != byte_of(rank, i, salt))
      expect(false, cat(what, ": byte ", i, " of rank ", rank));
  }
}

void gather_collects_the_parts_of_all(Communicator& c) {
  const auto memory = c.allocate(300'000, "source");
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{4096}, size_t{100'003}}) {
    for (const size_t offset : {size_t{0}, size_t{777}}) {
      fill(memory->local() + offset, bytes, c.rank(), bytes + offset);
      std::vector<std::byte> all(bytes * c.size() + 1, std::byte{0x5a});
      const Ticket ticket =
          c.begin_gather(c.world(), {memory.get(), offset, bytes}, all.data(), make_tag("gather"));
      c.wait_released(ticket);
      for (int r = 0; r < c.size(); ++r)
        expect_filled(all.data() + bytes * r, bytes, r, bytes + offset, "gathered");
      expect(all.back() == std::byte{0x5a}, "nothing is written behind the destination");
    }
  }
}

// Beyond the caches another copy is used; parts and places are odd on purpose.
void gather_collects_large_parts(Communicator& c) {
  constexpr size_t kWords = (17 << 20) / sizeof(uint32_t);
  constexpr size_t kBytes = kWords * sizeof(uint32_t) - 3;
  constexpr size_t kOffset = 5;
  constexpr size_t kStride = fsdp::testing::kSanitized ? 61 : 1;  // Words that are looked at.
  const auto word_of = [](int rank, size_t i) {
    return static_cast<uint32_t>(i * 2654435761U) ^ (0x9e3779b9U * (rank + 1));
  };
  const auto memory = c.allocate(kOffset + kWords * sizeof(uint32_t), "source");
  for (size_t i = 0; i < kWords; i += kStride) {
    const uint32_t word = word_of(c.rank(), i);
    std::memcpy(memory->local() + kOffset + i * sizeof(word), &word, sizeof(word));
  }
  std::vector<std::byte> all(kBytes * c.size() + 1, std::byte{0x5a});
  c.wait_released(
      c.begin_gather(c.world(), {memory.get(), kOffset, kBytes}, all.data(), make_tag("gather")));
  for (int r = 0; r < c.size(); ++r) {
    for (size_t i = 0; i < kWords; i += kStride) {
      const uint32_t expected = word_of(r, i);
      const size_t bytes = std::min(sizeof(uint32_t), kBytes - i * sizeof(uint32_t));
      if (std::memcmp(all.data() + kBytes * r + i * sizeof(uint32_t), &expected, bytes) != 0) {
        expect(false, cat("word ", i, " of rank ", r));
      }
    }
  }
  expect(all.back() == std::byte{0x5a}, "nothing is written behind the destination");
}

void gather_works_in_place(Communicator& c) {
  constexpr size_t kPart = 8192;
  const auto memory = c.allocate(kPart * c.size(), "whole");
  fill(memory->local() + kPart * c.rank(), kPart, c.rank());
  // Offsets are equal on all ranks, so the source is its own block, and the destination holds it
  // already for one rank.
  const auto part = c.allocate(kPart, "part");
  fill(part->local(), kPart, c.rank());
  c.wait_released(
      c.begin_gather(c.world(), {part.get(), 0, kPart}, memory->local(), make_tag("gather")));
  for (int r = 0; r < c.size(); ++r)
    expect_filled(memory->local() + kPart * r, kPart, r, 0, "gathered");
  if (c.size() == 1)
    c.wait_released(
        c.begin_gather(c.world(), {memory.get(), 0, kPart}, memory->local(), make_tag("self")));
  expect_filled(memory->local(), kPart, 0, 0, "after a gather onto itself");
}

void store(std::byte* at, DType dtype, int64_t i, float value) {
  const uint16_t half = dtype == DType::kBF16 ? float_to_bf16(value) : float_to_f16(value);
  if (dtype == DType::kF32)
    std::memcpy(at + 4 * i, &value, 4);
  else
    std::memcpy(at + 2 * i, &half, 2);
}

float stored(DType dtype, float value) {
  if (dtype == DType::kF32) return value;
  return dtype == DType::kBF16 ? bf16_to_float(float_to_bf16(value))
                               : f16_to_float(float_to_f16(value));
}

void fold_one(Communicator& c, SymmetricMemory& memory, DType dtype, int64_t numel,
              bool accumulate) {
  constexpr size_t kOffset = 512;
  for (int64_t i = 0; i < numel; ++i)
    store(memory.local() + kOffset, dtype, i, value_of(c.rank(), i, numel));
  // Ragged parts: rank 0 has none, the last takes the rest.
  const int64_t begin = c.rank() == 0 && c.size() > 1 ? 0 : numel * c.rank() / (c.size() + 1);
  const int64_t part = c.rank() == 0 && c.size() > 1 ? 0
                       : c.rank() + 1 == c.size()    ? numel - begin
                                                     : numel / (c.size() + 1);
  std::vector<float> sums(part + 1);
  for (int64_t i = 0; i <= part; ++i) sums[i] = value_of(99, i);
  const size_t bytes = numel * dtype_bytes(dtype);
  c.wait_released(c.begin_fold(c.world(), {&memory, kOffset, bytes}, dtype, begin,
                               {sums.data(), static_cast<size_t>(part)}, accumulate,
                               make_tag("fold")));
  for (int64_t i = 0; i < part; ++i) {
    float expected = accumulate ? value_of(99, i) : stored(dtype, value_of(0, begin + i, numel));
    for (int r = accumulate ? 0 : 1; r < c.size(); ++r)
      expected += stored(dtype, value_of(r, begin + i, numel));
    if (std::bit_cast<uint32_t>(expected) != std::bit_cast<uint32_t>(sums[i])) {
      expect(false, cat("bits of the left fold at ", i, " of ", dtype_name(dtype), ": ", sums[i],
                        ", expected ", expected));
    }
  }
  expect(sums[part] == value_of(99, part), "nothing is written behind the sums");
}

void fold_is_the_left_fold_bit_for_bit(Communicator& c) {
  const auto memory = c.allocate(512 + 4 * 20'011, "gradients");
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const int64_t numel : {0, 1, 1000, 20'011}) {
      fold_one(c, *memory, dtype, numel, false);
      fold_one(c, *memory, dtype, numel, true);
    }
  }
}

// Transports may fold large parts in pieces and give back what they have read: the next round must
// see new data.
void a_large_fold_is_the_left_fold(Communicator& c) {
  constexpr int64_t kNumel = (4 << 20) + 12'345, kOffset = 1003;
  const size_t bytes = static_cast<size_t>(kOffset + kNumel) * sizeof(float);
  const auto memory = c.allocate(bytes, "gradients");
  std::vector<float> sums(c.rank() + 1 == c.size() ? kNumel : 0);
  for (int round = 0; round < 2; ++round) {
    auto* mine = reinterpret_cast<float*>(memory->local());
    std::vector<float> values(kOffset + kNumel);
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = static_cast<float>((i * 7 + static_cast<size_t>(c.rank() + round)) % 1009) / 3;
    c.compute().write(mine, values.data(), bytes);
    c.wait_released(c.begin_fold(c.world(), {memory.get(), 0, bytes}, DType::kF32,
                                 sums.empty() ? 0 : kOffset, sums, false,
                                 make_tag("large fold", round)));
    for (size_t i = 0; i < sums.size(); ++i) {
      float expected = 0;
      for (int r = 0; r < c.size(); ++r)
        expected += static_cast<float>(((kOffset + i) * 7 + r + round) % 1009) / 3;
      if (sums[i] != expected)
        expect(false, cat("element ", i, " of a large fold: ", sums[i], ", expected ", expected));
    }
  }
}

void a_fold_may_replace_its_own_part(Communicator& c) {
  constexpr int64_t kPart = 3000;
  const int64_t numel = kPart * c.size();
  const size_t bytes = static_cast<size_t>(numel) * sizeof(float);
  const auto memory = c.allocate(bytes, "gradients");
  for (int round = 0; round < 3; ++round) {
    for (int64_t i = 0; i < numel; ++i)
      store(memory->local(), DType::kF32, i, value_of(c.rank(), i + round, numel));
    float* own = reinterpret_cast<float*>(memory->local()) + kPart * c.rank();
    c.wait_released(c.begin_fold(c.world(), {memory.get(), 0, bytes}, DType::kF32, kPart * c.rank(),
                                 {own, kPart}, false, make_tag("fold in place", round)));
    std::vector<float> sums(kPart);
    c.compute().read(own, sums.data(), kPart * sizeof(float));
    for (int64_t i = 0; i < kPart; ++i) {
      const int64_t at = kPart * c.rank() + i + round;
      float expected = value_of(0, at, numel);
      for (int r = 1; r < c.size(); ++r) expected += value_of(r, at, numel);
      expect(std::bit_cast<uint32_t>(expected) == std::bit_cast<uint32_t>(sums[i]),
             cat("bits of the left fold at ", i, ": ", sums[i], ", expected ", expected));
    }
  }
}

void several_collectives_are_under_way_at_once(Communicator& c) {
  constexpr int kMany = 12;
  constexpr size_t kBytes = 10'000;
  const auto memory = c.allocate(kMany * kBytes, "sources");
  std::vector<std::vector<std::byte>> gathered(kMany, std::vector<std::byte>(kBytes * c.size()));
  for (int round = 0; round < 20; ++round) {
    std::vector<Ticket> tickets;
    for (int i = 0; i < kMany; ++i) {
      fill(memory->local() + kBytes * i, kBytes, c.rank(), i + 100 * round);
      const SymmetricSpan source{memory.get(), kBytes * i, kBytes};
      tickets.push_back(
          c.begin_gather(c.world(), source, gathered[i].data(), make_tag("gather", round, i)));
    }
    c.finish(tickets[kMany / 2]);  // And with it all earlier ones.
    for (int i = 0; i <= kMany / 2; ++i) {
      for (int r = 0; r < c.size(); ++r) {
        expect_filled(gathered[i].data() + kBytes * r, kBytes, r, i + 100 * round,
                      "finished with a later one");
      }
    }
    c.finish(tickets[0]);
    c.finish(tickets[kMany - 1]);
    c.finish(tickets[kMany - 1]);
    for (int r = 0; r < c.size(); ++r) {
      expect_filled(gathered.back().data() + kBytes * r, kBytes, r, kMany - 1 + 100 * round,
                    "the last");
    }
    for (const Ticket ticket : tickets) c.wait_released(ticket);
  }
  c.finish({});
  c.wait_released({});
}

void a_source_may_change_once_it_is_released(Communicator& c) {
  constexpr size_t kBytes = 20'000;
  const auto memory = c.allocate(kBytes, "source");
  std::vector<std::byte> all(kBytes * c.size());
  for (int round = 0; round < 60; ++round) {
    fill(memory->local(), kBytes, c.rank(), round);
    const Ticket ticket =
        c.begin_gather(c.world(), {memory.get(), 0, kBytes}, all.data(), make_tag("gather", round));
    if ((round + c.rank()) % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
    c.finish(ticket);
    c.wait_released(ticket);
    std::memset(memory->local(), 0xee, kBytes);
    for (int r = 0; r < c.size(); ++r)
      expect_filled(all.data() + kBytes * r, kBytes, r, round, "before the change");
  }
}

void more_collectives_begin_than_the_ring_holds(Communicator& c) {
  constexpr int kMany = 300;
  const auto memory = c.allocate(sizeof(int) * kMany, "sources");
  auto* mine = reinterpret_cast<int*>(memory->local());
  std::vector<int> all(kMany * c.size());
  std::vector<Ticket> tickets;
  for (int i = 0; i < kMany; ++i) {
    mine[i] = 1000 * c.rank() + i;
    auto* destination = reinterpret_cast<std::byte*>(all.data() + i * c.size());
    tickets.push_back(c.begin_gather(c.world(), {memory.get(), sizeof(int) * i, sizeof(int)},
                                     destination, make_tag("g", i)));
  }
  for (const Ticket ticket : tickets) c.wait_released(ticket);
  for (int i = 0; i < kMany; ++i) {
    for (int r = 0; r < c.size(); ++r)
      expect(all[i * c.size() + r] == 1000 * r + i, cat("gather ", i, " of rank ", r));
  }
}

void exchange_hands_small_data_to_all(Communicator& c) {
  for (const size_t bytes : {0UL, 1UL, 8UL, 100'000UL, 262'144UL, 262'145UL, 1'000'000UL}) {
    std::vector<std::byte> mine(bytes);
    std::vector<std::byte> all(bytes * c.size() + 1, std::byte{0x5a});
    fill(mine.data(), bytes, c.rank(), bytes);
    c.exchange(mine.data(), bytes, all.data(), make_tag("exchange"));
    for (int r = 0; r < c.size(); ++r)
      expect_filled(all.data() + bytes * r, bytes, r, bytes, "exchanged");
    expect(all.back() == std::byte{0x5a}, "nothing is written behind the end");
  }
}

void broadcast_brings_the_roots_data(Communicator& c) {
  for (const size_t bytes : {0UL, 1UL, 262'144UL, 5'000'001UL}) {
    for (int root = 0; root < c.size(); ++root) {
      std::vector<std::byte> data(bytes);
      if (c.rank() == root) fill(data.data(), bytes, root, bytes);
      c.broadcast(data.data(), bytes, root, make_tag("broadcast"));
      expect_filled(data.data(), bytes, root, bytes, "broadcast");
    }
  }
}

void sums_and_maxima_are_exact(Communicator& c) {
  const int64_t n = c.size();
  for (int64_t i = 0; i < 200; ++i) {
    expect(c.sum((int64_t{1} << 40) * c.rank() + i, "tokens") ==
               (int64_t{1} << 40) * (n * (n - 1) / 2) + n * i,
           "sum");
    expect(c.maximum(-5 - c.rank(), "flag") == -5, "maximum of negative numbers");
  }
}

void nobody_passes_a_barrier_early(Communicator& c) {
  struct Times {
    int64_t came;
    int64_t went;
  };
  std::vector<Times> all(c.size());
  for (int64_t round = 1; round <= 100; ++round) {
    if (round % c.size() == c.rank()) std::this_thread::sleep_for(std::chrono::microseconds(300));
    Times mine{};
    mine.came = std::chrono::steady_clock::now().time_since_epoch().count();
    c.barrier(make_tag("arrive", round));
    mine.went = std::chrono::steady_clock::now().time_since_epoch().count();  // Of one clock.
    c.exchange(&mine, sizeof(mine), all.data(), make_tag("times", round));
    for (const Times& one : all) {
      for (const Times& other : all)
        expect(one.went >= other.came, cat("nobody goes before all have come, round ", round));
    }
  }
}

void memory_is_zero_aligned_and_outlives_its_handles(Communicator& c) {
  for (const size_t bytes : {0UL, 1UL, 5000UL, 3UL << 20}) {
    auto memory = c.allocate(bytes, "block");
    expect(memory->bytes() == bytes, "size");
    expect(reinterpret_cast<uintptr_t>(memory->local()) % 4096 == 0, "alignment");
    const auto is_set = [](std::byte b) { return b != std::byte{0}; };
    const auto set = std::count_if(memory->local(), memory->local() + bytes, is_set);
    expect(set == 0, cat(set, " bytes are not zero"));
    fill(memory->local(), bytes, c.rank(), bytes);
    std::vector<std::byte> all(bytes * c.size());
    const Ticket ticket =
        c.begin_gather(c.world(), {memory.get(), 0, bytes}, all.data(), make_tag("gather"));
    memory.reset();  // The collective under way keeps it.
    c.finish(ticket);
    for (int r = 0; r < c.size(); ++r)
      expect_filled(all.data() + bytes * r, bytes, r, bytes, "gathered");
  }
}

void a_groups_collectives_stay_in_the_group(Communicator& c) {
  // Neighbours in pairs, the last one alone if their number is odd; then all even and all odd
  // ranks.
  Group pair{c.rank() - c.rank() % 2};
  if (pair[0] + 1 < c.size()) pair.push_back(pair[0] + 1);
  Group alternate;
  for (int r = c.rank() % 2; r < c.size(); r += 2) alternate.push_back(r);
  const auto memory = c.allocate(sizeof(float), "value");
  for (int round = 0; round < 100; ++round) {
    for (const Group& group : {pair, alternate}) {
      const auto mine = static_cast<float>(c.rank() + 10 * round);
      std::memcpy(memory->local(), &mine, sizeof(mine));
      float sum = 0;
      c.wait_released(c.begin_fold(group, {memory.get(), 0, sizeof(float)}, DType::kF32, 0,
                                   {&sum, 1}, false, make_tag("pair")));
      float expected = 0;
      for (const int member : group) expected += static_cast<float>(member + 10 * round);
      expect(sum == expected, cat("sum of the group in round ", round));
    }
  }
}

}  // namespace

const std::vector<ConformanceCase>& data_cases() {
  static const std::vector<ConformanceCase> cases = {
      {"GatherCollectsThePartsOfAll", gather_collects_the_parts_of_all},
      {"GatherCollectsLargeParts", gather_collects_large_parts},
      {"GatherWorksInPlace", gather_works_in_place},
      {"FoldIsTheLeftFoldBitForBit", fold_is_the_left_fold_bit_for_bit},
      {"ALargeFoldIsTheLeftFold", a_large_fold_is_the_left_fold},
      {"AFoldMayReplaceItsOwnPart", a_fold_may_replace_its_own_part},
      {"SeveralCollectivesAreUnderWayAtOnce", several_collectives_are_under_way_at_once},
      {"ASourceMayChangeOnceItIsReleased", a_source_may_change_once_it_is_released},
      {"MoreCollectivesBeginThanTheRingHolds", more_collectives_begin_than_the_ring_holds},
      {"ExchangeHandsSmallDataToAll", exchange_hands_small_data_to_all},
      {"BroadcastBringsTheRootsData", broadcast_brings_the_roots_data},
      {"SumsAndMaximaAreExact", sums_and_maxima_are_exact},
      {"NobodyPassesABarrierEarly", nobody_passes_a_barrier_early},
      {"MemoryIsZeroAlignedAndOutlivesItsHandles", memory_is_zero_aligned_and_outlives_its_handles},
      {"AGroupsCollectivesStayInTheGroup", a_groups_collectives_stay_in_the_group},
  };
  return cases;
}

}  // namespace fsdp::comm
