#include "libfsdp/comm/fake.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "libfsdp/base/error.h"

namespace fsdp::comm {
namespace {

TEST(FakeTest, IsARankOfALargeWorldWithoutPeers) {
  const auto c = make_fake(4095, 4096);
  EXPECT_EQ(c->rank(), 4095);
  EXPECT_EQ(c->size(), 4096);
  EXPECT_EQ(c->world().size(), 4096U);
  EXPECT_EQ(c->sum(3, "tokens"), 3 * 4096);
  EXPECT_EQ(c->maximum(-7, "flag"), -7);
  c->barrier(make_tag("ready"));
  EXPECT_FALSE(c->can_share(c->world()));
  EXPECT_THROW(c->allocate_shared(c->world(), 10, "weights"), InternalError);
  EXPECT_THROW(make_fake(0, 4097), InternalError);
  EXPECT_THROW(make_fake(2, 2), InternalError);
}

TEST(FakeTest, GatherRepeatsOwnDataOrLeavesTheDestinationAlone) {
  for (const bool repeat : {true, false}) {
    const auto c = make_fake(2, 8, {.repeat_own_data = repeat});
    const auto memory = c->allocate(16, "source");
    std::memset(memory->local(), 7, 16);
    std::vector<std::byte> all(4 * 4 + 1, std::byte{42});
    c->wait_released(
        c->begin_gather({0, 2, 4, 6}, {memory.get(), 8, 4}, all.data(), make_tag("gather")));
    const std::byte expected{static_cast<unsigned char>(repeat ? 7 : 42)};
    EXPECT_EQ(std::count(all.begin(), all.end() - 1, expected), 16);
    EXPECT_EQ(all.back(), std::byte{42});
  }
}

TEST(FakeTest, FoldTakesOwnContribution) {
  const auto c = make_fake(1, 1024);
  const auto memory = c->allocate(4 * sizeof(float), "gradients");
  const float values[] = {1, 2, 3, 4};
  std::memcpy(memory->local(), values, sizeof(values));
  std::vector<float> sums = {10, 20};
  const SymmetricSpan source{memory.get(), 0, sizeof(values)};
  c->finish(c->begin_fold(c->world(), source, DType::kF32, 1, sums, true, make_tag("fold")));
  EXPECT_EQ(sums, (std::vector<float>{12, 23}));
  c->finish(c->begin_fold(c->world(), source, DType::kF32, 2, sums, false, make_tag("fold")));
  EXPECT_EQ(sums, (std::vector<float>{3, 4}));
}

TEST(FakeTest, CountsWhatWouldCrossTheNetwork) {
  const auto c = make_fake(3, 64, {.can_share = true});
  const auto memory = c->allocate(1000, "source");
  const auto shared = c->allocate_shared(c->world(), 100, "weights");
  EXPECT_EQ(shared->bytes(), 100U);
  std::vector<std::byte> all(64 * 1000);
  std::vector<float> sums(10);
  c->begin_gather(c->world(), {memory.get(), 0, 1000}, all.data(), make_tag("gather"));
  c->begin_gather({3, 5}, {memory.get(), 0, 100}, all.data(), make_tag("gather"));
  c->begin_fold(c->world(), {memory.get(), 0, 1000}, DType::kBF16, 5, sums, true, make_tag("fold"));
  c->begin_fence(c->world(), make_tag("fence"));
  c->exchange(all.data(), 16, all.data() + 16, make_tag("packet"));
  c->broadcast(all.data(), 30, 0, make_tag("names"));
  c->broadcast(all.data(), 30, 3, make_tag("names"));
  const auto expect = [&](CollectiveKind kind, int64_t collectives, int64_t bytes) {
    EXPECT_EQ(c->count(kind).collectives, collectives);
    EXPECT_EQ(c->count(kind).bytes, bytes);
  };
  expect(CollectiveKind::kAllocate, 1, 0);
  expect(CollectiveKind::kAllocateShared, 1, 0);
  expect(CollectiveKind::kGather, 2, 63 * 1000 + 100);
  expect(CollectiveKind::kFold, 1, 63 * 10 * 2);
  expect(CollectiveKind::kFence, 1, 0);
  expect(CollectiveKind::kExchange, 1, 63 * 16);
  expect(CollectiveKind::kBroadcast, 2, 30);
  EXPECT_EQ(c->total().collectives, 9);
  EXPECT_EQ(c->total().bytes, 63 * 1000 + 100 + 63 * 20 + 63 * 16 + 30);
  c->reset_counts();
  EXPECT_EQ(c->total().collectives, 0);
}

TEST(FakeTest, AnAbortEndsIt) {
  const auto c = make_fake(0, 4);
  c->abort("enough");
  EXPECT_THROW(c->barrier(make_tag("afterwards")), CommError);
  EXPECT_THROW(c->allocate(1, "afterwards"), CommError);
}

}  // namespace
}  // namespace fsdp::comm
