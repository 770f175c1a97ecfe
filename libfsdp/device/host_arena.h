// Host memory that is taken once and handed out by moving a pointer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace fsdp::device {

struct HostArenaOptions {
  std::string label = "host arena";  ///< For error texts.
  bool prefault = false;             ///< Touch all pages now instead of at first use.
  bool huge_pages = true;            ///< Ask the kernel for huge pages (a hint).
  bool poison = false;               ///< Fill every allocation with poison() instead of zeros.
};

/// One block of memory from the kernel, handed out front to back. Nothing is given back before the
/// arena ends.
///
/// Allocations are zero (or poisoned). Move-only; not thread-safe; pointers stay valid when the
/// arena is moved.
class HostArena {
 public:
  /// Throws HostResourceError when the kernel refuses; `bytes` may be 0.
  explicit HostArena(size_t bytes, HostArenaOptions options = {});
  ~HostArena();
  HostArena(HostArena&& other) noexcept;
  HostArena& operator=(HostArena&& other) noexcept;

  /// `bytes` at an address that is a multiple of `alignment` (a power of two, up to 4096). Throws
  /// InternalError when the arena is too small: its size is planned, so that is a bug of the plan.
  std::byte* allocate(size_t bytes, size_t alignment = 64);

  /// `n` elements of T, 64-byte aligned.
  template <class T>
  std::span<T> allocate_array(int64_t n) {
    return {reinterpret_cast<T*>(allocate(static_cast<size_t>(n) * sizeof(T))),
            static_cast<size_t>(n)};
  }

  size_t capacity_bytes() const { return capacity_; }
  size_t used_bytes() const { return used_; }  ///< With padding for alignment.
  int64_t num_allocations() const { return num_allocations_; }

 private:
  void release() noexcept;

  HostArenaOptions options_;
  std::byte* base_ = nullptr;
  size_t capacity_ = 0;
  size_t used_ = 0;
  int64_t num_allocations_ = 0;
};

/// Fills memory so that every float32, bfloat16, float16 and float64 in it is NaN. For
/// use-after-release tests.
void poison(void* memory, size_t bytes);

}  // namespace fsdp::device
