#include "libfsdp/device/host_arena.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "libfsdp/base/dtype.h"
#include "libfsdp/base/error.h"

namespace fsdp::device {
namespace {

TEST(HostArenaTest, HandsOutAlignedZeroMemoryWithoutOverlap) {
  HostArena arena(1 << 16);
  std::byte* first = arena.allocate(3);
  std::byte* second = arena.allocate(100, 4096);
  const std::span<double> third = arena.allocate_array<double>(10);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(first) % 64, 0U);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(second) % 4096, 0U);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(third.data()) % 64, 0U);
  EXPECT_GE(second, first + 3);
  EXPECT_GE(reinterpret_cast<std::byte*>(third.data()), second + 100);
  for (const double value : third) EXPECT_EQ(value, 0.0);
  EXPECT_EQ(arena.num_allocations(), 3);
  EXPECT_EQ(arena.used_bytes(), 4096U + 128U + 80U);
}

TEST(HostArenaTest, APlanThatIsTooSmallIsABug) {
  HostArena arena(100);
  arena.allocate(64);
  EXPECT_NO_THROW(arena.allocate(36));
  EXPECT_THROW(arena.allocate(1), InternalError);
  EXPECT_THROW(arena.allocate(~size_t{0}), InternalError);
  EXPECT_THROW(arena.allocate(1, 48), InternalError);
}

TEST(HostArenaTest, MemoryTheKernelRefusesIsAHostError) {
  EXPECT_THROW(HostArena(size_t{1} << 60, {.label = "test"}), HostResourceError);
}

TEST(HostArenaTest, PoisonIsNanInEveryFloatingType) {
  HostArena arena(1 << 12, {.poison = true});
  const std::span<uint16_t> halves = arena.allocate_array<uint16_t>(8);
  for (const uint16_t bits : halves) {
    EXPECT_TRUE(std::isnan(bf16_to_float(bits)));
    EXPECT_TRUE(std::isnan(f16_to_float(bits)));
  }
  for (const float value : arena.allocate_array<float>(8)) EXPECT_TRUE(std::isnan(value));
  for (const double value : arena.allocate_array<double>(8)) EXPECT_TRUE(std::isnan(value));
}

TEST(HostArenaTest, MovesKeepTheMemory) {
  HostArena arena(4096, {.prefault = true});
  const std::span<int32_t> numbers = arena.allocate_array<int32_t>(4);
  numbers[3] = 7;
  HostArena moved(std::move(arena));
  EXPECT_EQ(numbers[3], 7);
  EXPECT_EQ(moved.num_allocations(), 1);
  HostArena other(0);
  other = std::move(moved);
  EXPECT_EQ(numbers[3], 7);
  EXPECT_EQ(other.capacity_bytes(), 4096U);
}

}  // namespace
}  // namespace fsdp::device
