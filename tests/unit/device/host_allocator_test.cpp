#include "libfsdp/device/host_allocator.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstdlib>
#include <cstring>
#include <thread>

namespace fsdp::device {
namespace {

constexpr size_t kTemporaryBytes = 96 << 20;

// Page faults of this process while it takes, fills and frees one large temporary.
long faults_of_a_temporary() {
  rusage before{};
  rusage after{};
  getrusage(RUSAGE_SELF, &before);
  void* memory = std::malloc(kTemporaryBytes);
  std::memset(memory, 1, kTemporaryBytes);
  asm volatile("" : : "r"(memory) : "memory");
  std::free(memory);
  getrusage(RUSAGE_SELF, &after);
  return after.ru_minflt - before.ru_minflt;
}

TEST(HostAllocatorTest, TemporariesOfTheNextStepCauseNoPageFaults) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer brings its own allocator";
#endif
  ASSERT_TRUE(tune_host_allocator());
  faults_of_a_temporary();
  EXPECT_LT(faults_of_a_temporary(), 100);
  long in_thread = 0;
  std::thread([&in_thread] { in_thread = faults_of_a_temporary(); }).join();
  EXPECT_LT(in_thread, 100);
}

TEST(HostAllocatorTest, ATrimTakesPagesThatTheNextTemporaryFaultsIn) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer brings its own allocator";
#endif
  ASSERT_TRUE(tune_host_allocator());
  faults_of_a_temporary();
  EXPECT_TRUE(trim_host_allocator());
  EXPECT_GT(faults_of_a_temporary(), 100);
}

}  // namespace
}  // namespace fsdp::device
