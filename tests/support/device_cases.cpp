#include "tests/support/device_cases.h"

#include <stdexcept>
#include <string>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/compute.h"

namespace fsdp::testing {
namespace {

void expect(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error("not so: " + what);
}

/// An element whose sums depend on the order of additions.
float value_of(int rank, int64_t i, int round) {
  const auto bits = static_cast<uint32_t>((i + 1) * 2654435761LL + rank * 40503LL + round * 97LL);
  return (static_cast<float>(bits % 200003) - 100001.0F) / static_cast<float>(1 + bits % 977);
}

}  // namespace

std::vector<float> values_of(int rank, int64_t numel, int round) {
  std::vector<float> values(static_cast<size_t>(numel));
  for (int64_t i = 0; i < numel; ++i) values[static_cast<size_t>(i)] = value_of(rank, i, round);
  return values;
}

void gather_and_fold(comm::Communicator& c) {
  using comm::make_tag;
  using comm::Ticket;
  constexpr int64_t kPart = 20'096;
  const auto ranks = static_cast<int64_t>(c.size());
  const auto shards = c.allocate(kPart * sizeof(float), "shards");
  const auto all_bytes = static_cast<size_t>(ranks * kPart) * sizeof(float);
  const auto gradients = c.allocate(all_bytes, "gradients");
  const auto slot = c.allocate(all_bytes, "slot");
  kernels::Compute& compute = c.compute();
  const kernels::ComputeMemory sums = compute.allocate(kPart * sizeof(float), "sums");
  auto* const sum = reinterpret_cast<float*>(sums.get());
  const kernels::ComputeMemory written = compute.allocate(all_bytes, "values");
  auto* const values = reinterpret_cast<float*>(written.get());
  std::vector<float> got(static_cast<size_t>(ranks * kPart));
  for (int round = 0; round < 10; ++round) {
    compute.write_floats(values_of(c.rank(), ranks * kPart, round), values, DType::kF32);
    // Enqueued, and nobody waits for it but the collectives.
    compute.convert(values, shards->local(), DType::kF32, kPart);
    compute.convert(values, gradients->local(), DType::kF32, ranks * kPart);
    const Ticket gather = c.begin_gather(c.world(), {shards.get(), 0, shards->bytes()},
                                         slot->local(), make_tag("gather", round, 1));
    const Ticket fold =
        c.begin_fold(c.world(), {gradients.get(), 0, gradients->bytes()}, DType::kF32,
                     c.rank() * kPart, {sum, kPart}, false, make_tag("reduce", round, 1));
    c.wait_released(fold);
    compute.poison(shards->local(), shards->bytes());
    compute.poison(gradients->local(), gradients->bytes());
    c.finish(gather);
    compute.read_floats(slot->local(), DType::kF32, got);
    for (int64_t i = 0; i < ranks * kPart; ++i) {
      expect(got[static_cast<size_t>(i)] == value_of(static_cast<int>(i / kPart), i % kPart, round),
             cat("gathered element ", i, " in round ", round));
    }
    compute.read_floats(sum, DType::kF32, {got.data(), static_cast<size_t>(kPart)});
    for (int64_t i = 0; i < kPart; ++i) {
      float expected = value_of(0, c.rank() * kPart + i, round);
      for (int r = 1; r < c.size(); ++r) expected += value_of(r, c.rank() * kPart + i, round);
      expect(got[static_cast<size_t>(i)] == expected, cat("sum ", i, " in round ", round));
    }
  }
  c.barrier(make_tag("end"));
}

}  // namespace fsdp::testing
