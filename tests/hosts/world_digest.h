// A sequence of all collectives whose results are one number, to compare worlds by.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "libfsdp/comm/communicator.h"

namespace fsdp::testing {

class Digest {
 public:
  void add(const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i)
      value_ = (value_ ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211ULL;
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 14695981039346656037ULL;
};

/// Collective. Equal on all ranks, and in every world of this size, whatever carries its data: sums
/// round, so their order shows.
inline uint64_t world_digest(comm::Communicator& c) {
  constexpr int64_t kNumel = 20'011;
  const auto memory = c.allocate(kNumel * sizeof(float), "values");
  auto* mine = reinterpret_cast<float*>(memory->local());
  std::vector<float> sums(kNumel);
  std::vector<float> all(kNumel * c.size());
  Digest digest;
  for (int step = 0; step < 5; ++step) {
    for (int64_t i = 0; i < kNumel; ++i) {
      const auto mixed = static_cast<uint32_t>((i + 1) * 2654435761 + c.rank() * 40503 + step * 97);
      mine[i] = std::ldexp(static_cast<float>(mixed >> 9), static_cast<int>(mixed % 37) - 18);
    }
    const comm::SymmetricSpan source{memory.get(), 0, kNumel * sizeof(float)};
    const comm::Ticket fold = c.begin_fold(c.world(), source, DType::kF32, 0, sums, step != 0,
                                           comm::make_tag("fold", step, 1));
    const comm::Ticket gather =
        c.begin_gather(c.world(), source, reinterpret_cast<std::byte*>(all.data()),
                       comm::make_tag("gather", step, 2));
    c.wait_released(fold);
    c.wait_released(gather);
    digest.add(sums.data(), sums.size() * sizeof(float));
    digest.add(all.data(), all.size() * sizeof(float));
    double packet[8] = {};
    packet[step] = sums[step] * (c.rank() + 1);
    std::vector<double> packets(8 * c.size());
    c.exchange(packet, sizeof(packet), packets.data(), comm::make_tag("packet", step));
    digest.add(packets.data(), packets.size() * sizeof(double));
  }
  uint64_t value = digest.value();
  c.broadcast(&value, sizeof(value), c.size() - 1, comm::make_tag("last rank's"));
  if (value != digest.value() || c.sum(1, "ranks") != c.size()) return 0;
  return value;
}

}  // namespace fsdp::testing
