// A stand-in for libfsdp_cuda.so: the same tables over host memory, threads and the CPU twins of
// the kernels, so that everything above the tables runs, and is tested, on machines without a GPU.
//
// What it keeps of the real thing: streams are queues with a thread each, and dawdle at random, so
// that an order which nothing enforces breaks; events tell of what was recorded before the call;
// NCCL does not block, its collectives end when all ranks have come, an abort ends them. What it
// does not: the default stream runs in the caller, at once; handles "between processes" work within
// one.
#include "tests/support/cuda_stand_in.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "libfsdp/device/cuda_runtime_table.h"

namespace fsdp::stand_in {
namespace {

constexpr size_t kMemoryBytes = size_t{1} << 32;  // More than that is "out of memory".

// ---- Streams and events ----

class Stream {
 public:
  Stream() : thread_([this] { run(); }) {}
  ~Stream() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  void enqueue(std::function<void()> work) {
    {
      const std::lock_guard lock(mutex_);
      queue_.push_back(std::move(work));
    }
    changed_.notify_all();
  }
  void synchronize() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return queue_.empty() && !busy_; });
  }

 private:
  void run() {
    std::mt19937 random(std::random_device{}());
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const std::function<void()> work = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
      lock.unlock();
      if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
      work();
      lock.lock();
      busy_ = false;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool busy_ = false;
  bool stop_ = false;
  std::thread thread_;
};

/// The default stream of the calling thread, which is a rank; null = its work is done at once.
Stream* default_stream() {
  static const bool queues = std::getenv("FSDP_STAND_IN_QUEUES") != nullptr;
  thread_local const std::unique_ptr<Stream> own = queues ? std::make_unique<Stream>() : nullptr;
  return own.get();
}

Stream* as_stream(void* stream) {
  return stream != nullptr ? static_cast<Stream*>(stream) : default_stream();
}

}  // namespace

int enqueue(void* stream, std::function<void()> work) {
  if (Stream* const queue = as_stream(stream)) {
    queue->enqueue(std::move(work));
  } else {
    work();
  }
  return 0;
}

namespace {

int synchronize(void* stream) {
  if (Stream* const queue = as_stream(stream)) queue->synchronize();
  return 0;
}

struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0;
  uint64_t happened = 0;

  void wait_for(uint64_t record) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return happened >= record; });
  }
};
using EventHandle = std::shared_ptr<Event>;

const EventHandle& event_of(void* event) { return *static_cast<EventHandle*>(event); }

int create_event(void** event, int) {
  *event = new EventHandle(std::make_shared<Event>());
  return 0;
}

int record_event(void* handle, void* stream) {
  EventHandle event = event_of(handle);
  uint64_t record = 0;
  {
    const std::lock_guard lock(event->mutex);
    record = ++event->recorded;
  }
  return enqueue(stream, [event, record] {
    {
      const std::lock_guard lock(event->mutex);
      event->happened = std::max(event->happened, record);
    }
    event->changed.notify_all();
  });
}

int wait_event(void* stream, void* handle) {
  EventHandle event = event_of(handle);
  uint64_t record = 0;
  {
    const std::lock_guard lock(event->mutex);
    record = event->recorded;
  }
  return enqueue(stream, [event, record] { event->wait_for(record); });
}

int query_event(void* handle, int* done) {
  const EventHandle& event = event_of(handle);
  const std::lock_guard lock(event->mutex);
  *done = event->happened >= event->recorded ? 1 : 0;
  return 0;
}

int synchronize_event(void* handle) {
  const EventHandle& event = event_of(handle);
  uint64_t record = 0;
  {
    const std::lock_guard lock(event->mutex);
    record = event->recorded;
  }
  event->wait_for(record);
  return 0;
}

}  // namespace

int allocate(void** memory, size_t bytes) {
  if (bytes > kMemoryBytes) return kNoMemory;
  // Not zero: the users must not rely on it.
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (*memory == nullptr) return kNoMemory;
  std::memset(*memory, 0xcd, bytes);
  return 0;
}

int free_memory(void* memory) {
  synchronize(nullptr);  // As cudaFree does.
  std::free(memory);
  return 0;
}

namespace {

template <class Handle>
int put_handle(void* handle, Handle* of) {
  std::memset(handle, 0, device::kCudaIpcHandleBytes);
  std::memcpy(handle, &of, sizeof(of));
  return 0;
}

template <class Handle>
Handle* from_handle(const void* handle) {
  Handle* of = nullptr;
  std::memcpy(&of, handle, sizeof(of));
  return of;
}

int num_devices() {
  const char* text = std::getenv("FSDP_STAND_IN_DEVICES");
  return text != nullptr ? std::atoi(text) : 8;
}

const device::CudaRuntimeTable kRuntime = {
    device::kCudaTableVersion,
    [](int* count) {
      *count = num_devices();
      return 0;
    },
    [](int device) { return device < num_devices() ? 0 : kInvalid; },
    [](size_t* free_bytes, size_t* total_bytes) {
      *free_bytes = *total_bytes = kMemoryBytes;
      return 0;
    },
    allocate,
    free_memory,
    allocate,
    free_memory,
    [](void** stream, int) {
      *stream = new Stream;
      return 0;
    },
    [](void* stream) {
      delete static_cast<Stream*>(stream);
      return 0;
    },
    synchronize,
    create_event,
    [](void* event) {
      delete static_cast<EventHandle*>(event);
      return 0;
    },
    record_event,
    wait_event,
    synchronize_event,
    query_event,
    [](void*, void*, float* milliseconds) {
      *milliseconds = 0;
      return 0;
    },
    [](void* to, const void* from, size_t bytes, void* stream) {
      return enqueue(stream, [=] { std::memcpy(to, from, bytes); });
    },
    [](void* memory, int value, size_t bytes, void* stream) {
      return enqueue(stream, [=] { std::memset(memory, value, bytes); });
    },
    [](int) { return "standInError"; },
    [](int code) { return code == kNoMemory ? "out of memory" : "invalid"; },
    [](int code) { return code == kNoMemory ? 1 : 0; },
    [](void** event) { return create_event(event, 0); },
    [](void* handle, void* event) { return put_handle(handle, static_cast<EventHandle*>(event)); },
    [](void** event, const void* handle) {
      *event = new EventHandle(*from_handle<EventHandle>(handle));
      return 0;
    },
    [](void* handle, void* memory) { return put_handle(handle, static_cast<std::byte*>(memory)); },
    [](void** memory, const void* handle) {
      *memory = from_handle<std::byte>(handle);
      return 0;
    },
    [](void*) { return 0; },
    [](int device, char* text) {
      std::strcpy(text, ("card " + std::to_string(device)).c_str());
      return 0;
    },
    1,
};

}  // namespace
}  // namespace fsdp::stand_in

extern "C" __attribute__((visibility("default"))) const fsdp::device::CudaRuntimeTable*
fsdp_cuda_runtime_table() {
  return &fsdp::stand_in::kRuntime;
}
