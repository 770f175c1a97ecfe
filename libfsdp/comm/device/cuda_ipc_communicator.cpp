// Not yet run on a GPU: see docs/status.md.
#include "libfsdp/comm/device/cuda_ipc_communicator.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"
#include "libfsdp/comm/agreement.h"
#include "libfsdp/comm/collective_checks.h"
#include "libfsdp/comm/device/device_communicator.h"
#include "libfsdp/device/cuda_loader.h"

namespace fsdp::comm {
namespace {

constexpr uint64_t kRing = 64;
constexpr int64_t kSharedBlock = 2 << 20;  // See CudaRuntimeTable.
constexpr double kSpinSeconds = 10e-6;

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class IpcMemory final : public SymmetricMemory {
 public:
  IpcMemory(uint32_t id, size_t bytes)
      : id_(id),
        bytes_(bytes),
        own_(static_cast<size_t>(round_up(static_cast<int64_t>(bytes), kSharedBlock))) {}
  size_t bytes() const override { return bytes_; }
  std::byte* local() override { return own_.data(); }
  const std::byte* peer(int rank) const override {
    const device::OpenedCudaMemory& opened = peers_[static_cast<size_t>(rank)];
    return opened.data() != nullptr ? opened.data() : own_.data();
  }
  uint32_t id() const { return id_; }
  device::CudaIpcHandle handle() const {
    return bytes_ == 0 ? device::CudaIpcHandle{} : device::cuda_memory_handle(own_.data());
  }
  void open(const std::vector<device::CudaIpcHandle>& handles, int rank) {
    for (int peer = 0; peer < static_cast<int>(handles.size()); ++peer) {
      const bool other = peer != rank && bytes_ > 0;
      peers_.push_back(other ? device::OpenedCudaMemory(handles[static_cast<size_t>(peer)])
                             : device::OpenedCudaMemory());
    }
  }

 private:
  uint32_t id_;
  size_t bytes_;
  device::CudaBuffer own_;
  std::vector<device::OpenedCudaMemory> peers_;  // The own place is empty.
};

/// What each rank shows the others in host memory.
struct Board {
  std::array<Posted, kRing> posted;
  /// Collectives whose copies have been enqueued, and their `done` recorded.
  std::atomic<uint64_t> copied;
};

/// One rank's events, as this rank has them.
struct Events {
  std::vector<device::SharedCudaEvent> ready;
  std::vector<device::SharedCudaEvent> done;
};

/// A collective that this rank has begun.
struct Pending {
  Posted posted;
  Group members;
  Ticket on_host;
  IpcMemory* memory = nullptr;
  size_t offset = 0;
  size_t bytes = 0;
  std::byte* destination = nullptr;  // Gather.
  int64_t begin = 0;                 // Fold: first element.
  std::span<float> sums;
  bool accumulate = false;
};

class CudaIpcCommunicator final : public DeviceCommunicator {
 public:
  CudaIpcCommunicator(std::unique_ptr<Communicator> host_world,
                      std::shared_ptr<kernels::Compute> device_compute, const CommOptions& options)
      : DeviceCommunicator(std::move(host_world), std::move(device_compute), options),
        boards_(host().allocate(sizeof(Board), "collectives on the device")),
        others_(kRing * static_cast<size_t>(size())) {
    if (size() > 1 && boards_->peer(rank() == 0 ? 1 : 0) == nullptr)
      throw ConfigError("[comm] cuda_ipc needs ranks of one host, over shm");
    share_events();
  }
  ~CudaIpcCommunicator() override {
    try {  // Peers may still read this rank's memory.
      const double until = seconds_now() + this->options().peer_timeout_s;
      for (int peer = 0; peer < size(); ++peer) {
        while (copied(peer) < finished_ && seconds_now() < until) std::this_thread::yield();
      }
      compute().synchronize();
      host().barrier(make_tag("end of the device's world"));
    } catch (const std::exception&) {  // Others have failed, and said so.
    }
  }

  std::shared_ptr<SymmetricMemory> allocate(size_t bytes, std::string_view label) override {
    std::shared_ptr<IpcMemory> memory;
    const auto id = static_cast<uint32_t>(memory_.size() + 1);
    agree_on_memory([&] { memory = std::make_shared<IpcMemory>(id, bytes); }, bytes, label);
    const device::CudaIpcHandle mine = memory->handle();
    std::vector<device::CudaIpcHandle> all(static_cast<size_t>(size()));
    host().exchange(&mine, sizeof(mine), all.data(), make_tag(label));
    memory->open(all, rank());
    if (bytes > 0) compute().zero(memory->local(), bytes);
    compute().synchronize();
    host().barrier(make_tag(label));
    memory_.push_back(memory);
    return memory;
  }

  Ticket begin_gather(const Group& group, SymmetricSpan source, std::byte* destination,
                      Tag tag) override {
    Pending& pending = post(CollectiveKind::kGather, tag.dtype, group, source, tag);
    pending.destination = destination;
    return begin(pending);
  }
  Ticket begin_fold(const Group& group, SymmetricSpan source, DType dtype, int64_t begin_at,
                    std::span<float> destination, bool accumulate, Tag tag) override {
    require_part(source, dtype, begin_at, destination);
    Pending& pending = post(CollectiveKind::kFold, dtype, group, source, tag);
    pending.begin = begin_at;
    pending.sums = destination;
    pending.accumulate = accumulate;
    return begin(pending);
  }
  Ticket begin_fence(const Group& group, Tag tag) override {
    host().finish(host().begin_fence(group, tag));
    return {};
  }

  void finish(Ticket ticket) override {
    check(ticket.sequence <= begun_, "a ticket of another communicator");
    while (finished_ < ticket.sequence) finish_next();
  }

  void wait_released(Ticket ticket) override {
    finish(ticket);
    // Older tickets were waited for when their place in the ring was used again.
    if (ticket.sequence == 0 || begun_ - ticket.sequence >= kRing) return;
    const size_t place = ticket.sequence % kRing;
    const Pending& pending = pending_[place];
    for (const int member : pending.members) {
      if (member == rank()) continue;
      wait_for_copies(member, ticket.sequence, pending);
      device::wait_event(compute().stream(),
                         events_[static_cast<size_t>(member)].done[place].get());
    }
  }

 private:
  Board& board() { return *reinterpret_cast<Board*>(boards_->local()); }
  uint64_t copied(int peer) {
    const std::byte* const memory = peer == rank() ? boards_->local() : boards_->peer(peer);
    return reinterpret_cast<const Board*>(memory)->copied.load(std::memory_order_acquire);
  }

  void share_events() {
    events_.resize(static_cast<size_t>(size()));
    Events& own = events_[static_cast<size_t>(rank())];
    std::vector<device::CudaIpcHandle> mine;
    for (std::vector<device::SharedCudaEvent>* events : {&own.ready, &own.done}) {
      for (uint64_t i = 0; i < kRing; ++i) mine.push_back(events->emplace_back().handle());
    }
    std::vector<device::CudaIpcHandle> all(mine.size() * static_cast<size_t>(size()));
    host().exchange(mine.data(), mine.size() * sizeof(mine[0]), all.data(),
                    make_tag("CUDA events"));
    for (int peer = 0; peer < size(); ++peer) {
      if (peer == rank()) continue;
      const auto handle = all.begin() + static_cast<std::ptrdiff_t>(mine.size()) * peer;
      Events& theirs = events_[static_cast<size_t>(peer)];
      for (uint64_t i = 0; i < kRing; ++i) {
        theirs.ready.emplace_back(handle[static_cast<std::ptrdiff_t>(i)]);
        theirs.done.emplace_back(handle[static_cast<std::ptrdiff_t>(kRing + i)]);
      }
    }
    host().barrier(make_tag("CUDA events"));  // Their owners keep them until all have opened them.
  }

  Pending& post(CollectiveKind kind, DType dtype, const Group& group, const SymmetricSpan& source,
                Tag tag) {
    require_member(group, rank());
    auto* memory = dynamic_cast<IpcMemory*>(source.memory);
    check(memory != nullptr, "a collective's source is not memory of this communicator");
    require_source(source);
    const uint64_t sequence = begun_ + 1;
    Pending& pending = pending_[sequence % kRing];
    if (sequence > kRing) {
      wait_released({sequence - kRing});
      host().wait_released(pending.on_host);  // What is posted in this place has been read.
    }
    tag.kind = kind;
    tag.dtype = dtype;
    tag.bytes = static_cast<int64_t>(source.bytes);
    pending.posted = {sequence, group_key(group), source.offset, memory->id(), tag};
    pending.members.assign(group.begin(), group.end());
    pending.memory = memory;
    pending.offset = source.offset;
    pending.bytes = source.bytes;
    return pending;
  }

  Ticket begin(Pending& pending) {
    const uint64_t sequence = pending.posted.sequence;
    const size_t place = sequence % kRing;
    const Tag& tag = pending.posted.tag;
    device::record_event(events_[static_cast<size_t>(rank())].ready[place].get(),
                         compute().stream());
    board().posted[place] = pending.posted;
    const SymmetricSpan posted{boards_.get(), offsetof(Board, posted) + place * sizeof(Posted),
                               sizeof(Posted)};
    pending.on_host = host().begin_gather(pending.members, posted,
                                          reinterpret_cast<std::byte*>(others_of(sequence)),
                                          make_tag(tag.what, tag.step, tag.unit));
    begun_ = sequence;
    return {sequence};
  }

  Posted* others_of(uint64_t sequence) {
    return others_.data() + sequence % kRing * static_cast<size_t>(size());
  }

  void finish_next() {
    const uint64_t sequence = finished_ + 1;
    const size_t place = sequence % kRing;
    const Pending& pending = pending_[place];
    host().finish(pending.on_host);
    compare(pending);
    for (const int member : pending.members) {
      device::wait_event(stream().get(), events_[static_cast<size_t>(member)].ready[place].get());
    }
    if (pending.bytes > 0) move_data(pending);
    void* const done = events_[static_cast<size_t>(rank())].done[place].get();
    device::record_event(done, stream().get());
    device::wait_event(compute().stream(), done);
    finished_ = sequence;
    board().copied.store(sequence, std::memory_order_release);
  }

  void compare(const Pending& pending) {
    for (size_t m = 0; m < pending.members.size(); ++m) {
      const std::string text = difference(rank(), pending.posted, pending.members[m],
                                          others_of(pending.posted.sequence)[m],
                                          [this](int32_t unit) { return unit_name(unit); });
      if (text.empty()) continue;
      abort(text);
      throw CommError(text);
    }
  }

  void move_data(const Pending& pending) {
    if (pending.posted.tag.kind == CollectiveKind::kFold) return fold(pending);
    for (size_t m = 0; m < pending.members.size(); ++m) {
      const std::byte* const from = pending.memory->peer(pending.members[m]) + pending.offset;
      std::byte* const to = pending.destination + pending.bytes * m;
      if (from != to) device::copy_async(to, from, pending.bytes, stream());
    }
  }

  void fold(const Pending& pending) {
    const DType dtype = pending.posted.tag.dtype;
    sources_.clear();
    for (const int member : pending.members) {
      sources_.push_back(pending.memory->peer(member) + pending.offset +
                         pending.begin * static_cast<int64_t>(dtype_bytes(dtype)));
    }
    fold_on_stream(pending.sums.data(), sources_, dtype, static_cast<int64_t>(pending.sums.size()),
                   pending.accumulate);
  }

  /// Until `member` has enqueued its copies and recorded their end: before, its event still tells
  /// of an earlier collective.
  void wait_for_copies(int member, uint64_t sequence, const Pending& pending) {
    const double begin = seconds_now();
    while (copied(member) < sequence) {
      const double waited = seconds_now() - begin;
      if (waited < kSpinSeconds) continue;
      host().finish(pending.on_host);  // Throws when somebody has aborted.
      if (waited > options().timeout_s) {
        const std::string text =
            cat("[comm] rank ", member, " did not finish within ", options().timeout_s, " s; rank ",
                rank(), " waited for it in ", named(pending.posted.tag));
        abort(text);
        throw CommError(text);
      }
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }

  std::shared_ptr<SymmetricMemory> boards_;  // Host memory.
  std::vector<Posted> others_;               // By place in the ring and member.
  std::vector<Events> events_;               // By rank.
  std::vector<std::shared_ptr<IpcMemory>> memory_;
  std::array<Pending, kRing> pending_;
  std::vector<const void*> sources_;  // Of the fold that is enqueued.
  uint64_t begun_ = 0;
  uint64_t finished_ = 0;
};

}  // namespace

std::unique_ptr<Communicator> make_cuda_ipc(std::unique_ptr<Communicator> host,
                                            std::shared_ptr<kernels::Compute> compute,
                                            const CommOptions& options) {
  return std::make_unique<CudaIpcCommunicator>(std::move(host), std::move(compute), options);
}

}  // namespace fsdp::comm
