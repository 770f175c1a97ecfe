#include "libfsdp/comm/os/futex.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace fsdp::comm {

void Signal::set(uint64_t larger) {
  value.store(larger, std::memory_order_seq_cst);
  if (waiters.load(std::memory_order_seq_cst) != 0) wake();
}

void Signal::wake() { syscall(SYS_futex, &value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

void Signal::sleep(uint64_t seen, int milliseconds) {
  const timespec limit{milliseconds / 1000, (milliseconds % 1000) * 1'000'000L};
  syscall(SYS_futex, &value, FUTEX_WAIT, static_cast<uint32_t>(seen), &limit, nullptr, 0);
}

}  // namespace fsdp::comm
