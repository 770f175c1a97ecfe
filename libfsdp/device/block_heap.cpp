#include "libfsdp/device/block_heap.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>

#include "libfsdp/base/error.h"

namespace fsdp::device {
namespace {

constexpr size_t kAlignment = 64;

}  // namespace

BlockHeap::BlockHeap(size_t reserve_bytes)
    : capacity_(reserve_bytes / kAlignment * kAlignment), gaps_{{0, capacity_}} {
  void* base = mmap(nullptr, capacity_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    throw HostResourceError(cat("block heap: cannot reserve ", capacity_,
                                " bytes of addresses: ", std::strerror(errno)));
  }
  base_ = static_cast<std::byte*>(base);
}

BlockHeap::~BlockHeap() { munmap(base_, capacity_); }

void* BlockHeap::allocate(size_t bytes) {
  if (bytes > capacity_) return nullptr;
  bytes = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  const std::lock_guard lock(mutex_);
  const auto gap =
      std::find_if(gaps_.begin(), gaps_.end(), [&](const auto& g) { return g.second >= bytes; });
  if (gap == gaps_.end()) return nullptr;
  const auto [begin, room] = *gap;
  gaps_.erase(gap);
  if (room > bytes) gaps_.emplace(begin + bytes, room - bytes);
  blocks_.emplace(begin, bytes);
  extent_ = std::max(extent_, begin + bytes);
  return base_ + begin;
}

void BlockHeap::release(void* block) {
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(static_cast<size_t>(static_cast<std::byte*>(block) - base_));
  check(found != blocks_.end(), "a block is given back that this heap has not handed out");
  const auto [begin, bytes] = *found;
  blocks_.erase(found);
  add_gap(begin, bytes);
}

void BlockHeap::add_gap(size_t begin, size_t bytes) {
  auto next = gaps_.lower_bound(begin);
  if (next != gaps_.end() && next->first == begin + bytes) {
    bytes += next->second;
    next = gaps_.erase(next);
  }
  if (next != gaps_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == begin) {
      before->second += bytes;
      return;
    }
  }
  gaps_.emplace_hint(next, begin, bytes);
}

bool BlockHeap::owns(const void* block) const {
  const auto* at = static_cast<const std::byte*>(block);
  return at >= base_ && at < base_ + capacity_;
}

size_t BlockHeap::extent() const {
  const std::lock_guard lock(mutex_);
  return extent_;
}

}  // namespace fsdp::device
