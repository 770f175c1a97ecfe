#include "libfsdp/device/block_heap.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "libfsdp/base/error.h"

namespace fsdp::device {
namespace {

constexpr size_t kReserve = size_t{1} << 30;

TEST(BlockHeapTest, BlocksAreAlignedAndDoNotOverlap) {
  BlockHeap heap(kReserve);
  std::mt19937 random(1);
  struct Block {
    std::byte* data;
    size_t bytes;
    int value;
  };
  std::vector<Block> blocks;
  for (int i = 0; i < 2000; ++i) {
    if (blocks.size() > 40) {
      std::swap(blocks[random() % blocks.size()], blocks.back());
      const Block last = blocks.back();
      for (size_t at = 0; at < last.bytes; ++at)
        ASSERT_EQ(last.data[at], static_cast<std::byte>(last.value));
      heap.release(last.data);
      blocks.pop_back();
    }
    const size_t bytes = random() % 5000;
    auto* data = static_cast<std::byte*>(heap.allocate(bytes));
    ASSERT_EQ(reinterpret_cast<uintptr_t>(data) % 64, 0U);
    ASSERT_TRUE(heap.owns(data));
    std::memset(data, i % 251, bytes);
    blocks.push_back({data, bytes, i % 251});
  }
  EXPECT_LT(heap.extent(), size_t{41 * 5000 * 2});
}

TEST(BlockHeapTest, EqualStepsGetEqualAddressesInAnyOrderOfRelease) {
  BlockHeap heap(kReserve);
  std::vector<void*> first;
  for (int step = 0; step < 6; ++step) {
    std::vector<void*> blocks;
    for (size_t i = 0; i < 60; ++i) blocks.push_back(heap.allocate(1000 * (1 + i % 7)));
    if (step == 0) first = blocks;
    EXPECT_EQ(blocks, first);
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937(step));
    for (void* block : blocks) heap.release(block);
  }
  EXPECT_EQ(heap.allocate(kReserve), first[0]);  // All gaps have grown together.
}

TEST(BlockHeapTest, ReservesAddressesAndNoMemory) {
  BlockHeap heap(size_t{1} << 40);
  auto* data = static_cast<std::byte*>(heap.allocate(size_t{1} << 39));
  ASSERT_NE(data, nullptr);
  data[0] = data[(size_t{1} << 39) - 1] = std::byte{1};
}

TEST(BlockHeapTest, GivesNothingWhereNoGapIsLargeEnough) {
  BlockHeap heap(1 << 20);
  EXPECT_EQ(heap.allocate(SIZE_MAX), nullptr);
  EXPECT_EQ(heap.allocate((1 << 20) + 1), nullptr);
  void* all = heap.allocate(1 << 20);
  EXPECT_EQ(heap.allocate(1), nullptr);
  heap.release(all);
  EXPECT_EQ(heap.allocate(1 << 20), all);
}

TEST(BlockHeapTest, RefusesABlockThatIsNotOut) {
  BlockHeap heap(1 << 20);
  auto* block = static_cast<std::byte*>(heap.allocate(4096));
  EXPECT_THROW(heap.release(block + 64), InternalError);
  heap.release(block);
  EXPECT_THROW(heap.release(block), InternalError);
  int other = 0;
  EXPECT_FALSE(heap.owns(&other));
}

TEST(BlockHeapTest, ThreadsShareIt) {
  BlockHeap heap(kReserve);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&heap, t] {
      for (int i = 0; i < 2000; ++i) {
        auto* numbers = static_cast<int*>(heap.allocate(1024));
        for (int n = 0; n < 256; ++n) numbers[n] = t;
        for (int n = 0; n < 256; ++n) ASSERT_EQ(numbers[n], t);
        heap.release(numbers);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(heap.extent(), 4 * size_t{1024});
}

}  // namespace
}  // namespace fsdp::device
