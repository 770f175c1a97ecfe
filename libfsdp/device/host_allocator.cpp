#include "libfsdp/device/host_allocator.h"

#include <climits>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace fsdp::device {

bool tune_host_allocator() {
#if defined(__GLIBC__)
  constexpr int kKeepBelowBytes = 1 << 30;
  constexpr int kGrowByBytes = 64 << 20;
  return mallopt(M_MMAP_THRESHOLD, kKeepBelowBytes) == 1 &&
         mallopt(M_TRIM_THRESHOLD, INT_MAX) == 1 && mallopt(M_TOP_PAD, kGrowByBytes) == 1 &&
         mallopt(M_ARENA_MAX, 1) == 1;
#else
  return false;
#endif
}

bool trim_host_allocator() {
#if defined(__GLIBC__)
  return malloc_trim(0) == 1;
#else
  return false;
#endif
}

}  // namespace fsdp::device
