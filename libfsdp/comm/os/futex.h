// A counter that other threads and other processes can wait for.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>

namespace fsdp::comm {

/// Lives in memory that may be shared between processes; zero bytes are a valid start.
///
/// Note [Waiters] The setter stores the value and then looks at `waiters`; a waiter adds itself to
/// `waiters` and then looks at the value. All four are sequentially consistent, so at least one
/// side sees the other, and a set without waiters costs no system call. A waiter that is killed
/// leaves its count behind, which only costs needless wakes.
struct Signal {
  alignas(64) std::atomic<uint64_t> value{0};
  std::atomic<uint32_t> waiters{0};

  uint64_t get() const { return value.load(std::memory_order_acquire); }
  /// Stores a larger value and wakes those who sleep.
  void set(uint64_t larger);
  /// Wakes those who sleep although the value did not change.
  void wake();
  /// Sleeps until the value differs from `seen`, a wake, a signal, or the time is over. The caller
  /// is counted in `waiters`.
  void sleep(uint64_t seen, int milliseconds);
};

// The kernel compares 32 bits: the low half of the counter, which is the first half in memory.
static_assert(std::endian::native == std::endian::little);
static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(std::atomic<uint64_t>) == 8);

/// Tells the processor that this is a spinning loop.
inline void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace fsdp::comm
