// Memory for the temporaries of steps that repeat: large blocks apart from everything else that a
// process allocates.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

namespace fsdp::device {

/// Hands out blocks of one range of addresses, each from the first gap that holds it.
///
/// A general heap mixes temporaries with small things that stay, and these keep the gaps of a step
/// from growing together again: the heap of a training step grew to 1.2 times what was ever in use.
/// Here a step that ends with all blocks released starts the next with one gap, so the same
/// sequence of requests gets the same addresses.
///
/// Thread-safe. Memory: pages are taken when first touched and stay with the process.
class BlockHeap {
 public:
  /// Reserves addresses, no memory. Throws HostResourceError.
  explicit BlockHeap(size_t reserve_bytes);
  BlockHeap(const BlockHeap&) = delete;
  BlockHeap& operator=(const BlockHeap&) = delete;
  ~BlockHeap();

  /// 64-byte aligned; null when no gap is large enough. Cost: a walk over the gaps.
  void* allocate(size_t bytes);
  /// `block` comes from allocate and is given back once, else InternalError.
  void release(void* block);
  bool owns(const void* block) const;
  /// From the begin of the range to the end of the highest block so far.
  size_t extent() const;

 private:
  void add_gap(size_t begin, size_t bytes);

  mutable std::mutex mutex_;
  std::byte* base_ = nullptr;
  size_t capacity_ = 0;
  size_t extent_ = 0;
  std::map<size_t, size_t> gaps_;    // begin -> bytes; no two of them touch
  std::map<size_t, size_t> blocks_;  // begin -> bytes
};

}  // namespace fsdp::device
