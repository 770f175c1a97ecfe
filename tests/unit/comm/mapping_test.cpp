#include "libfsdp/comm/os/mapping.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstring>

namespace fsdp::comm {
namespace {

constexpr size_t kBytes = 1 << 20;

long page_faults() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_minflt;
}

int64_t sum_of(const Mapping& mapping) {
  int64_t sum = 0;
  for (size_t i = 0; i < kBytes; ++i) sum += static_cast<int64_t>(mapping.data()[i]);
  return sum;
}

TEST(MappingTest, AViewForgetsPagesAndReadsThemAgain) {
  const int file = make_memory_file("pages", kBytes);
  const auto owner = Mapping::of_file(file, kBytes, true),
             view = Mapping::of_file(file, kBytes, false);
  close(file);
  std::memset(owner->data(), 1, kBytes);
  EXPECT_EQ(sum_of(*view), int64_t{kBytes});
  const long before = page_faults();
  EXPECT_EQ(sum_of(*view), int64_t{kBytes});
  const long held = page_faults() - before;
  view->forget(100, kBytes);  // From the page that it begins in, and no further than the end.
  EXPECT_EQ(sum_of(*view), int64_t{kBytes});
  EXPECT_GT(page_faults() - before - held, held);
  view->forget(2 * kBytes, 1);
}

TEST(MappingTest, MemoryThatIsWrittenForgetsNothing) {
  const auto anonymous = Mapping::anonymous(kBytes);
  std::memset(anonymous->data(), 2, kBytes);
  anonymous->forget(0, kBytes);
  EXPECT_EQ(sum_of(*anonymous), 2 * int64_t{kBytes});
}

}  // namespace
}  // namespace fsdp::comm
