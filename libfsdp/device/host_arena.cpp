#include "libfsdp/device/host_arena.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "libfsdp/base/error.h"

namespace fsdp::device {
namespace {

constexpr size_t kPageBytes = 4096;

std::byte* map_pages(size_t bytes, const HostArenaOptions& options) {
  const int flags =
      MAP_PRIVATE | MAP_ANONYMOUS | (options.prefault && !options.huge_pages ? MAP_POPULATE : 0);
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (base == MAP_FAILED) {
    throw HostResourceError(
        cat(options.label, ": cannot map ", bytes, " bytes of memory: ", std::strerror(errno),
            ". Hint: fewer ranks on this host, or shorter sequences, need less."));
  }
  if (options.huge_pages) madvise(base, bytes, MADV_HUGEPAGE);
  // Note: populating inside mmap would come before the hint, and give small pages.
  if (options.prefault && options.huge_pages) {
    for (size_t at = 0; at < bytes; at += kPageBytes)
      static_cast<volatile std::byte*>(base)[at] = std::byte{0};
  }
  return static_cast<std::byte*>(base);
}

}  // namespace

HostArena::HostArena(size_t bytes, HostArenaOptions options)
    : options_(std::move(options)), capacity_(bytes) {
  if (bytes > 0) base_ = map_pages(bytes, options_);
}

HostArena::~HostArena() { release(); }

HostArena::HostArena(HostArena&& other) noexcept
    : options_(std::move(other.options_)),
      base_(std::exchange(other.base_, nullptr)),
      capacity_(std::exchange(other.capacity_, 0)),
      used_(std::exchange(other.used_, 0)),
      num_allocations_(std::exchange(other.num_allocations_, 0)) {}

HostArena& HostArena::operator=(HostArena&& other) noexcept {
  if (this == &other) return *this;
  release();
  options_ = std::move(other.options_);
  base_ = std::exchange(other.base_, nullptr);
  capacity_ = std::exchange(other.capacity_, 0);
  used_ = std::exchange(other.used_, 0);
  num_allocations_ = std::exchange(other.num_allocations_, 0);
  return *this;
}

void HostArena::release() noexcept {
  if (base_ != nullptr) munmap(base_, capacity_);
  base_ = nullptr;
}

std::byte* HostArena::allocate(size_t bytes, size_t alignment) {
  check(
      alignment != 0 && (alignment & (alignment - 1)) == 0 && alignment <= kPageBytes,
      cat(options_.label, ": alignment ", alignment, " is not a power of two up to ", kPageBytes));
  const size_t begin = (used_ + alignment - 1) & ~(alignment - 1);
  if (begin > capacity_ || bytes > capacity_ - begin) {
    throw InternalError(cat(options_.label, ": ", bytes, " bytes asked for, ", capacity_ - used_,
                            " of ", capacity_, " are left: the plan of this arena is too small"));
  }
  used_ = begin + bytes;
  ++num_allocations_;
  if (options_.poison) poison(base_ + begin, bytes);
  return base_ + begin;
}

void poison(void* memory, size_t bytes) {
  if (bytes > 0) std::memset(memory, 0xff, bytes);  // Of no byte there may be no address.
}

}  // namespace fsdp::device
