// What the conformance cases leave out: texts, several worlds, the fixture itself, the heap.
#include "libfsdp/comm/communicator.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/control/control.h"
#include "libfsdp/comm/host/shm_world.h"
#include "libfsdp/comm/host/thread_world.h"
#include "tests/support/rank_threads.h"
#include "tests/support/sanitized.h"

namespace {

std::atomic<int64_t> heap_requests{0};

}  // namespace

#if !FSDP_TEST_SANITIZED
__attribute__((noinline)) void* operator new(size_t bytes) {
  ++heap_requests;
  if (void* memory = std::malloc(bytes == 0 ? 1 : bytes)) return memory;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* memory) noexcept { std::free(memory); }
__attribute__((noinline)) void operator delete(void* memory, size_t) noexcept { std::free(memory); }
#endif

namespace fsdp::comm {
namespace {

TEST(TagTest, IsDescribedForPeople) {
  Tag tag = make_tag("gradients", 7, 3);
  tag.kind = CollectiveKind::kFold;
  tag.dtype = DType::kBF16;
  tag.bytes = 4096;
  EXPECT_EQ(describe(tag), "fold 'gradients' of unit 3 at step 7 (bfloat16, 4096 bytes)");
  EXPECT_EQ(describe(make_tag("barrier")), "barrier");
  EXPECT_EQ(std::string(make_tag(std::string(100, 'x')).what), std::string(23, 'x'));
  EXPECT_NE(make_tag("a"), make_tag("b"));
}

TEST(ThreadWorldTest, TwoWorldsLiveInOneProcess) {
  ThreadWorld first(2);
  ThreadWorld second(2);
  std::vector<std::thread> threads;
  std::vector<int64_t> sums(4);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      const auto communicator = (i < 2 ? first : second).communicator(i % 2);
      for (int round = 0; round < 100; ++round) sums[i] = communicator->sum(i, "sum");
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(sums, (std::vector<int64_t>{1, 1, 5, 5}));
}

TEST(ThreadWorldTest, ARankIsTakenOnce) {
  ThreadWorld world(2);
  const auto taken = world.communicator(1);
  EXPECT_THROW(world.communicator(1), InternalError);
  EXPECT_THROW(world.communicator(2), InternalError);
  EXPECT_THROW(ThreadWorld(0), InternalError);
}

TEST(ThreadWorldTest, CollectivesDoNotTouchTheHeap) {
  std::atomic<int64_t> requests{-1};
  testing::run_ranks(2, [&](Communicator& c) {
    const auto memory = c.allocate(4096, "source");
    std::vector<float> sums(512);
    std::vector<std::byte> all(8192);
    c.barrier(make_tag("ready"));
    const int64_t before = heap_requests;
    for (int step = 0; step < 200; ++step) {
      const SymmetricSpan source{memory.get(), 0, 4096};
      const Ticket gather = c.begin_gather(c.world(), source, all.data(), make_tag("gather", step));
      c.wait_released(c.begin_fold(c.world(), source, DType::kF32, 512 * c.rank(), sums, true,
                                   make_tag("fold", step)));
      c.wait_released(gather);
      c.sum(1, "tokens");
    }
    c.barrier(make_tag("done"));
    if (c.rank() == 0) requests = heap_requests - before;
    c.barrier(make_tag("read"));
  });
  EXPECT_EQ(requests, 0);
}

// Polls c.failure() until it says something.
std::string first_failure(Communicator& c) {
  std::string text;
  for (int look = 0; look < 200 && text.empty(); ++look) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    text = c.failure();
  }
  return text;
}

TEST(FailureTest, IsKnownWithoutACollective) {
  std::vector<RankParts> parts = make_shm_world(4);
  const auto memory = map_control(parts[0]);
  const ControlView control = ControlView::open(memory->data(), memory->bytes());
  const CommOptions options{.peer_timeout_s = 0.4};
  const auto first = join_shm(std::move(parts[0]), options);
  auto second = join_shm(std::move(parts[1]), options);
  EXPECT_EQ(first->failure(), "") << "ranks that have not joined yet";
  control.rank(3).presence = Presence::kJoined;  // And no thread that shows a sign of life.
  const std::string still = first_failure(*first);
  EXPECT_TRUE(still.starts_with("rank 3 has shown no sign of life for 0.4 s")) << still;
  parts[2] = {};  // As when its process has ended.
  EXPECT_EQ(first->failure(), "rank 2 is gone: its process has ended");
  EXPECT_EQ(second->failure(), "rank 2 is gone: its process has ended");
  second.reset();
  EXPECT_EQ(first->failure(), "rank 1 has left: its part of the program has ended");
  first->abort("no more data");
  EXPECT_EQ(first->failure(), "rank 0 failed: no more data");
}

TEST(RankThreadsTest, ReportsEveryFailingRankAndTheCauseFirst) {
  const std::string text = testing::run_ranks_quietly(4, [](Communicator& c) {
    if (c.rank() >= 2) throw DataError(cat("bad record ", c.rank()));
    c.barrier(make_tag("wait"));
  });
  EXPECT_TRUE(text.starts_with("rank 2: bad record 2\nrank 3: bad record 3\n")) << text;
  EXPECT_NE(text.find("\nrank 0: [comm] rank "), std::string::npos) << text;
  EXPECT_NE(text.find("\nrank 1: [comm] rank "), std::string::npos) << text;
  EXPECT_EQ(testing::run_ranks_quietly(4, [](Communicator& c) { c.barrier(make_tag("all")); }), "");
}

}  // namespace
}  // namespace fsdp::comm
