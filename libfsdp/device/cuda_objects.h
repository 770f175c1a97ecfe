// CUDA streams, events and memory as C++ owners. No CUDA headers: everything goes through the
// loaded table.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "libfsdp/device/cuda_runtime_table.h"

namespace fsdp::device {

/// An owned handle that is freed once. Destructors ignore errors: the device may already be gone.
template <void (*kDestroy)(void*)>
class CudaHandle {
 public:
  CudaHandle() = default;
  explicit CudaHandle(void* handle) : handle_(handle) {}
  ~CudaHandle() { reset(); }
  CudaHandle(CudaHandle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  CudaHandle& operator=(CudaHandle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  void* get() const { return handle_; }

 private:
  void reset() {
    if (handle_ != nullptr) kDestroy(std::exchange(handle_, nullptr));
  }
  void* handle_ = nullptr;
};

void destroy_cuda_stream(void* stream);
void destroy_cuda_event(void* event);
void free_cuda_device(void* memory);
void free_cuda_pinned(void* memory);
void close_cuda_memory(void* memory);

class CudaEvent;

/// A non-blocking stream of the current device. All calls of this file throw as check_cuda().
class CudaStream {
 public:
  enum class Priority { kNormal, kHigh };
  explicit CudaStream(Priority priority = Priority::kNormal);

  /// Work enqueued from now on starts after `event` has happened. The host does not wait.
  void wait(const CudaEvent& event) const;
  /// Blocks the host until all enqueued work is done.
  void synchronize() const;
  /// The cudaStream_t.
  void* get() const { return handle_.get(); }

 private:
  CudaHandle<destroy_cuda_stream> handle_;
};

/// A point in a stream. Created once and recorded every step: creating events in a step would
/// allocate.
class CudaEvent {
 public:
  enum class Timing { kOff, kOn };
  explicit CudaEvent(Timing timing = Timing::kOff);

  void record(const CudaStream& stream) const;
  /// True when the work before the last record is done (or nothing was recorded).
  bool done() const;
  void synchronize() const;
  /// Milliseconds from `begin` to this event; both with timing and done.
  float elapsed_ms(const CudaEvent& begin) const;
  void* get() const { return handle_.get(); }

 private:
  CudaHandle<destroy_cuda_event> handle_;
};

/// Memory of the current device, 256-byte aligned. Throws DeviceMemoryError.
class CudaBuffer {
 public:
  CudaBuffer() = default;
  explicit CudaBuffer(size_t bytes);
  std::byte* data() const { return static_cast<std::byte*>(handle_.get()); }
  size_t bytes() const { return bytes_; }

 private:
  CudaHandle<free_cuda_device> handle_;
  size_t bytes_ = 0;
};

/// Page-locked host memory, which copies need to run beside kernels.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(size_t bytes);
  std::byte* data() const { return static_cast<std::byte*>(handle_.get()); }
  size_t bytes() const { return bytes_; }

 private:
  CudaHandle<free_cuda_pinned> handle_;
  size_t bytes_ = 0;
};

/// What another process opens memory or an event by.
struct CudaIpcHandle {
  std::array<std::byte, kCudaIpcHandleBytes> bytes{};
};

/// An event that other processes can wait for: one of this process, or an opened one of another.
/// A wait is for what was recorded last when the wait is enqueued; opened events are not recorded.
class SharedCudaEvent {
 public:
  SharedCudaEvent();
  explicit SharedCudaEvent(const CudaIpcHandle& of_other);
  CudaIpcHandle handle() const;
  void* get() const { return handle_.get(); }

 private:
  CudaHandle<destroy_cuda_event> handle_;
};

/// Memory of another process, mapped. Ends before its owner frees it.
class OpenedCudaMemory {
 public:
  OpenedCudaMemory() = default;
  explicit OpenedCudaMemory(const CudaIpcHandle& of_other);
  std::byte* data() const { return static_cast<std::byte*>(handle_.get()); }

 private:
  CudaHandle<close_cuda_memory> handle_;
};

/// Of memory that was allocated with a size that is a multiple of 2 MiB.
CudaIpcHandle cuda_memory_handle(void* memory);

/// Streams and events by their CUDA handles, for streams that belong to somebody else (null = the
/// default stream).
void record_event(void* event, void* stream);
void wait_event(void* stream, void* event);

/// The streams of one rank: communication has priority, so that a small kernel of it is not queued
/// behind matmuls.
struct StreamSet {
  CudaStream compute{CudaStream::Priority::kNormal};
  CudaStream gather{CudaStream::Priority::kHigh};
  CudaStream reduce{CudaStream::Priority::kHigh};
  CudaStream copy{CudaStream::Priority::kNormal};  ///< Host offload.
};

/// Enqueues a copy between any two places (host memory must be pinned, or the call waits).
void copy_async(void* to, const void* from, size_t bytes, const CudaStream& stream);
/// Enqueues a fill with one byte.
void fill_async(void* memory, uint8_t value, size_t bytes, const CudaStream& stream);
/// Makes `device` current for the calling thread.
void set_cuda_device(int device);

struct CudaMemoryInfo {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
};
/// Memory of the current device.
CudaMemoryInfo cuda_memory_info();

}  // namespace fsdp::device
