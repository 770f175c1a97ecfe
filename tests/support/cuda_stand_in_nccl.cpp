// The stand-in's NCCL: collectives of threads, which end when all ranks have come.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/comm/device/nccl_table.h"
#include "tests/support/cuda_stand_in.h"

namespace fsdp::stand_in {
namespace {

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
}  // namespace fsdp::stand_in

extern "C" __attribute__((visibility("default"))) const fsdp::comm::NcclTable* fsdp_nccl_table() {
  return &fsdp::stand_in::kNccl;
}
