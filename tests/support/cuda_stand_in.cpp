// A stand-in for libfsdp_cuda.so: the same tables over host memory, threads and the CPU twins of
// the kernels, so that everything above the tables runs, and is tested, on machines without a GPU.
//
// What it keeps of the real thing: streams are queues with a thread each, and dawdle at random, so
// that an order which nothing enforces breaks; events tell of what was recorded before the call;
// NCCL does not block, its collectives end when all ranks have come, an abort ends them. What it
// does not: the default stream runs in the caller, at once; handles "between processes" work within
// one.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/comm/device/nccl_table.h"
#include "libfsdp/device/cuda_runtime_table.h"
#include "libfsdp/kernels/compute.h"
#include "libfsdp/kernels/cuda_kernel_table.h"
#include "libfsdp/kernels/fold.h"
#include "libfsdp/kernels/quantized_weight.h"
#include "libfsdp/kernels/split_master.h"
#include "libfsdp/kernels/update.h"

namespace fsdp {
namespace {

constexpr int kInvalid = 1;
constexpr int kNoMemory = 2;
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

int enqueue(void* stream, std::function<void()> work) {
  if (Stream* const queue = as_stream(stream)) {
    queue->enqueue(std::move(work));
  } else {
    work();
  }
  return 0;
}

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

// ---- Kernels ----

DType dtype_of(kernels::FoldType type) {
  if (type == kernels::FoldType::kF32) return DType::kF32;
  return type == kernels::FoldType::kBf16 ? DType::kBF16 : DType::kF16;
}

int fold_ranks(float* destination, const void* const* sources, int count, kernels::FoldType type,
               int64_t n, int accumulate, void* stream) {
  const std::vector<const void*> list(sources, sources + count);
  return enqueue(
      stream, [=] { kernels::fold_ranks(destination, list, dtype_of(type), n, accumulate != 0); });
}

int add_gradient_sums(const float* values, int64_t n, kernels::NormType type, int64_t* limbs,
                      float* max_abs, int64_t* non_finite, void* stream) {
  return enqueue(stream, [=] {
    kernels::GradientSums sums;
    kernels::add_gradient_sums(values, n, type, sums);
    const kernels::ExactSum::Limbs more = sums.sum.limbs();
    for (size_t i = 0; i < more.size(); ++i) limbs[i] += more[i];
    *max_abs = std::max(*max_abs, sums.max_abs);
    *non_finite += sums.non_finite;
  });
}

const kernels::CudaKernelTable kKernels = {
    kernels::kCudaKernelTableVersion,
    [](const float* master, uint16_t* high, uint16_t* remainder, int64_t n, void* stream) {
      return enqueue(stream, [=] { kernels::split_master_cpu(master, high, remainder, n); });
    },
    [](const uint16_t* high, const uint16_t* remainder, float* master, int64_t n, void* stream) {
      return enqueue(stream, [=] { kernels::join_master_cpu(high, remainder, master, n); });
    },
    fold_ranks,
    [](const float* from, void* to, kernels::FoldType type, int64_t n, void* stream) {
      return enqueue(stream, [=] { kernels::host_compute().convert(from, to, dtype_of(type), n); });
    },
    [](float* values, int64_t n, float factor, float limit, void* stream) {
      return enqueue(stream, [=] { kernels::host_compute().scale(values, n, factor, limit); });
    },
    [](const float* values, int64_t n, kernels::NormType type, double* sums, int64_t* non_finite,
       void* stream) {
      return enqueue(stream, [=] { *non_finite += kernels::quantum_sums(values, n, type, sums); });
    },
    add_gradient_sums,
    [](const kernels::ParameterArrays* parameter, const float* gradient, float* exp_avg,
       float* exp_avg_sq, int64_t n, const kernels::AdamWScalars* scalars, void* stream) {
      return enqueue(stream, [=, p = *parameter, s = *scalars] {
        kernels::adamw(p, gradient, exp_avg, exp_avg_sq, n, s);
      });
    },
    [](const kernels::ParameterArrays* parameter, const float* gradient, float* buffer, int64_t n,
       int nesterov, const kernels::SgdScalars* scalars, void* stream) {
      return enqueue(stream, [=, p = *parameter, s = *scalars] {
        kernels::sgd(p, gradient, buffer, n, nesterov != 0, s);
      });
    },
    [](const kernels::AnyPrecisionArrays* arrays, int64_t n,
       const kernels::AnyPrecisionScalars* scalars, void* stream) {
      return enqueue(stream,
                     [=, a = *arrays, s = *scalars] { kernels::any_precision_adamw(a, n, s); });
    },
    [](const kernels::ParameterArrays* parameter, const float* gradient,
       const kernels::QuantizedState* state, int64_t n, const kernels::AdamWScalars* scalars,
       void* stream) {
      return enqueue(stream, [=, p = *parameter, q = *state, s = *scalars] {
        kernels::adamw_8bit(p, gradient, q, n, s);
      });
    },
    [](const void* values, kernels::FoldType type, int64_t numel, kernels::FourBitCode code,
       int64_t blocksize, uint8_t* packed, float* absmax, void* stream) {
      return enqueue(stream, [=] {
        kernels::quantize_4bit(values, dtype_of(type), numel, code, blocksize, packed, absmax);
      });
    },
    [](const uint8_t* packed, const float* absmax, int64_t numel, kernels::FourBitCode code,
       int64_t blocksize, void* values, kernels::FoldType type, void* stream) {
      return enqueue(stream, [=] {
        kernels::dequantize_4bit(packed, absmax, numel, code, blocksize, values, dtype_of(type));
      });
    },
    [](const uint8_t* codes, const float* nested_absmax, float offset, int64_t skip, int64_t n,
       float* absmax, void* stream) {
      return enqueue(stream, [=] {
        kernels::dequantize_absmax(codes, nested_absmax, offset, skip, n, absmax);
      });
    },
    [](const void* values, kernels::FoldType type, int64_t rows, int64_t columns, int8_t* codes,
       float* absmax, void* stream) {
      return enqueue(stream, [=] {
        kernels::quantize_int8(values, dtype_of(type), rows, columns, codes, absmax);
      });
    },
    [](const int8_t* codes, const float* absmax, int64_t columns, int64_t skip, int64_t numel,
       void* values, kernels::FoldType type, void* stream) {
      return enqueue(stream, [=] {
        kernels::dequantize_int8(codes, absmax, columns, skip, numel, values, dtype_of(type));
      });
    },
};

// ---- NCCL ----

/// What a collective's ranks show each other.
struct Meeting {
  std::vector<const void*> from;
  int come = 0;
  int gone = 0;
};

struct World {
  std::mutex mutex;
  std::condition_variable changed;
  std::set<int> joined;
  bool aborted = false;
  std::map<uint64_t, Meeting> meetings;                         // By number of the collective.
  std::map<std::pair<int, int>, std::deque<const void*>> mail;  // By sender and receiver.
};

struct Comm {
  std::shared_ptr<World> world;
  int rank = 0;
  int size = 0;
  uint64_t collectives = 0;
};

Comm& as_comm(void* comm) { return *static_cast<Comm*>(comm); }

/// Shows `from`, runs `use` over what all showed, and leaves when all have used it.
void meet(World& world, int size, int rank, uint64_t number, const void* from,
          const std::function<void(const std::vector<const void*>&)>& use) {
  std::unique_lock lock(world.mutex);
  Meeting& meeting = world.meetings[number];
  meeting.from.resize(static_cast<size_t>(size));
  meeting.from[static_cast<size_t>(rank)] = from;
  ++meeting.come;
  world.changed.notify_all();
  world.changed.wait(lock, [&] { return meeting.come == size || world.aborted; });
  if (world.aborted) return;
  lock.unlock();
  use(meeting.from);
  lock.lock();
  ++meeting.gone;
  world.changed.notify_all();
  world.changed.wait(lock, [&] { return meeting.gone == size || world.aborted; });
}

int collective(void* comm, void* stream, const void* from,
               std::function<void(const std::vector<const void*>&, int rank)> use) {
  Comm& mine = as_comm(comm);
  const uint64_t number = ++mine.collectives;
  return enqueue(stream, [world = mine.world, size = mine.size, rank = mine.rank, number, from,
                          use = std::move(use)] {
    meet(*world, size, rank, number, from, [&](const auto& all) { use(all, rank); });
  });
}

/// Sums in the type of the elements, rounded after each addition, from the last rank to the first:
/// NCCL promises no order.
void add_all(const std::vector<const void*>& from, size_t begin, void* to, size_t count,
             comm::NcclType type) {
  const DType dtype = type == comm::NcclType::kF32    ? DType::kF32
                      : type == comm::NcclType::kBf16 ? DType::kBF16
                                                      : DType::kF16;
  const size_t item = dtype_bytes(dtype);
  std::vector<float> sum(count);
  std::vector<float> one(count);
  std::vector<std::byte> rounded(count * item);
  for (auto source = from.rbegin(); source != from.rend(); ++source) {
    convert_floats(static_cast<const std::byte*>(*source) + begin * item, dtype, one.data(),
                   DType::kF32, count);
    for (size_t i = 0; i < count; ++i) sum[i] += one[i];
    convert_floats(sum.data(), DType::kF32, rounded.data(), dtype, count);
    convert_floats(rounded.data(), dtype, sum.data(), DType::kF32, count);
  }
  std::memcpy(to, rounded.data(), rounded.size());
}

struct Message {
  bool is_send;
  const void* from;
  void* to;
  size_t bytes;
  int peer;
  void* comm;
  void* stream;
};
thread_local std::vector<Message> grouped;

void exchange_messages(World& world, int rank, const std::vector<Message>& messages) {
  std::unique_lock lock(world.mutex);
  for (const Message& message : messages) {
    if (message.is_send) world.mail[{rank, message.peer}].push_back(message.from);
  }
  world.changed.notify_all();
  for (const Message& message : messages) {
    if (message.is_send) continue;
    auto& box = world.mail[{message.peer, rank}];
    world.changed.wait(lock, [&] { return !box.empty() || world.aborted; });
    if (world.aborted) return;
    std::memcpy(message.to, box.front(), message.bytes);
    box.pop_front();
    world.changed.notify_all();
  }
  for (const Message& message : messages) {
    if (!message.is_send) continue;
    auto& box = world.mail[{rank, message.peer}];
    world.changed.wait(lock, [&] { return box.empty() || world.aborted; });
  }
}

int group_end() {
  std::vector<Message> messages;
  messages.swap(grouped);
  if (messages.empty()) return 0;
  Comm& comm = as_comm(messages.front().comm);
  void* const stream = messages.front().stream;
  return enqueue(stream, [world = comm.world, rank = comm.rank, messages = std::move(messages)] {
    exchange_messages(*world, rank, messages);
  });
}

std::shared_ptr<World> world_of(const std::string& id) {
  static std::mutex mutex;
  static std::map<std::string, std::shared_ptr<World>> worlds;
  const std::lock_guard lock(mutex);
  std::shared_ptr<World>& world = worlds[id];
  if (world == nullptr) world = std::make_shared<World>();
  return world;
}

int make_id(void* id) {
  static std::atomic<uint64_t> next{1};
  std::memset(id, 0, comm::kNcclIdBytes);
  const uint64_t number = next++;
  std::memcpy(id, &number, sizeof(number));
  return 0;
}

int init(void** comm, int size, const void* id, int rank) {
  auto* const made = new Comm;
  made->world = world_of({static_cast<const char*>(id), comm::kNcclIdBytes});
  made->rank = rank;
  made->size = size;
  const std::lock_guard lock(made->world->mutex);
  made->world->joined.insert(rank);
  *comm = made;
  return comm::kNcclInProgress;
}

int async_error(void* comm, int* state) {
  Comm& mine = as_comm(comm);
  const std::lock_guard lock(mine.world->mutex);
  const bool all = static_cast<int>(mine.world->joined.size()) == mine.size;
  *state = all ? comm::kNcclSuccess : comm::kNcclInProgress;
  return 0;
}

int abort_comm(void* comm) {
  const std::shared_ptr<World> world = as_comm(comm).world;
  {
    const std::lock_guard lock(world->mutex);
    world->aborted = true;
  }
  world->changed.notify_all();
  delete static_cast<Comm*>(comm);
  return 0;
}

const comm::NcclTable kNccl = {
    comm::kNcclTableVersion,
    make_id,
    init,
    async_error,
    [](void*) { return comm::kNcclSuccess; },
    [](void* comm) {
      delete static_cast<Comm*>(comm);
      return 0;
    },
    abort_comm,
    allocate,
    free_memory,
    [](void*, void*, size_t, void** window) {
      *window = nullptr;  // As where windows are not supported.
      return 0;
    },
    [](void*, void*) { return 0; },
    [](void*, void* memory, size_t, void** handle) {
      *handle = memory;
      return 0;
    },
    [](void*, void*) { return 0; },
    [](const void* from, void* to, size_t bytes, void* comm, void* stream) {
      return collective(comm, stream, from, [=](const auto& all, int) {
        for (size_t i = 0; i < all.size(); ++i) {
          std::byte* const at = static_cast<std::byte*>(to) + i * bytes;
          if (all[i] != at) std::memcpy(at, all[i], bytes);
        }
      });
    },
    [](const void* from, void* to, size_t count, comm::NcclType type, void* comm, void* stream) {
      return collective(comm, stream, from, [=](const auto& all, int rank) {
        add_all(all, count * static_cast<size_t>(rank), to, count, type);
      });
    },
    [](const void* from, void* to, size_t count, comm::NcclType type, void* comm, void* stream) {
      // Apart first: in place, peers still read what the sum would overwrite.
      const auto sum =
          std::make_shared<std::vector<std::byte>>(count * (type == comm::NcclType::kF32 ? 4 : 2));
      const int code = collective(comm, stream, from, [=](const auto& all, int) {
        add_all(all, 0, sum->data(), count, type);
      });
      enqueue(stream, [=] { std::memcpy(to, sum->data(), sum->size()); });
      return code;
    },
    [](const void* from, size_t bytes, int peer, void* comm, void* stream) {
      grouped.push_back({true, from, nullptr, bytes, peer, comm, stream});
      return 0;
    },
    [](void* to, size_t bytes, int peer, void* comm, void* stream) {
      grouped.push_back({false, nullptr, to, bytes, peer, comm, stream});
      return 0;
    },
    [] { return 0; },
    group_end,
    [](int) { return "an error of the stand-in"; },
    [](void*) { return ""; },
};

}  // namespace
}  // namespace fsdp

#define FSDP_EXPORT extern "C" __attribute__((visibility("default")))
FSDP_EXPORT const fsdp::device::CudaRuntimeTable* fsdp_cuda_runtime_table() {
  return &fsdp::kRuntime;
}
FSDP_EXPORT const fsdp::kernels::CudaKernelTable* fsdp_cuda_kernel_table() {
  return &fsdp::kKernels;
}
FSDP_EXPORT const fsdp::comm::NcclTable* fsdp_nccl_table() { return &fsdp::kNccl; }
