// Not yet run on a GPU: see docs/status.md.
#include "libfsdp/comm/device/nccl_communicator.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <list>
#include <mutex>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/collective_checks.h"
#include "libfsdp/comm/device/device_communicator.h"
#include "libfsdp/comm/device/nccl_groups.h"
#include "libfsdp/comm/device/nccl_watchdog.h"
#include "libfsdp/comm/fold_parts.h"
#include "libfsdp/device/cuda_loader.h"

namespace fsdp::comm {
namespace {

NcclType nccl_type(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return NcclType::kF32;
    case DType::kBF16:
      return NcclType::kBf16;
    case DType::kF16:
      return NcclType::kF16;
    default:
      throw InternalError(
          cat("a fold of ", dtype_name(dtype), "; expected float32, bfloat16 or float16"));
  }
}

class NcclMemory final : public SymmetricMemory {
 public:
  NcclMemory(std::shared_ptr<NcclGroups> groups, uint32_t id, size_t bytes)
      : groups_(std::move(groups)), id_(id), bytes_(bytes) {
    constexpr int kNcclOutOfMemory = 1;  // ncclUnhandledCudaError is what it says then.
    const int code = bytes == 0 ? kNcclSuccess : nccl().allocate(&memory_, bytes);
    if (code == kNcclOutOfMemory)
      throw DeviceMemoryError(
          cat("ncclMemAlloc of ", bytes, " bytes: ", nccl().last_error(nullptr)));
    check(code == kNcclSuccess, "ncclMemAlloc failed");
  }
  ~NcclMemory() override {
    if (memory_ == nullptr) return;
    groups_->forget(memory_);
    nccl().free_memory(memory_);
  }
  NcclMemory(const NcclMemory&) = delete;
  NcclMemory& operator=(const NcclMemory&) = delete;

  size_t bytes() const override { return bytes_; }
  std::byte* local() override { return static_cast<std::byte*>(memory_); }
  const std::byte* peer(int) const override { return nullptr; }
  uint32_t id() const { return id_; }

 private:
  std::shared_ptr<NcclGroups> groups_;
  uint32_t id_;
  size_t bytes_;
  void* memory_ = nullptr;
};

/// How a source is folded: found out at its first fold.
struct FoldPlan {
  Group group;
  uint32_t memory = 0;
  size_t offset = 0;
  size_t bytes = 0;
  DType dtype = DType::kF32;
  std::vector<FoldPart> parts;  // By member.
  FoldTiles tiles;
};

/// What a rank tells with each exchange about the collectives before it.
struct Begun {
  uint64_t count = 0;
  uint64_t hash = 0xcbf29ce484222325ULL;
  Tag last;

  void add(const Tag& tag) {
    ++count;
    last = tag;
    const auto mix = [this](const auto& value) {
      std::array<unsigned char, sizeof(value)> bytes;
      std::memcpy(bytes.data(), &value, sizeof(value));
      for (const unsigned char byte : bytes) hash = (hash ^ byte) * 0x100000001b3ULL;
    };
    mix(tag.kind), mix(tag.dtype), mix(tag.unit), mix(tag.step), mix(tag.bytes), mix(tag.what);
  }
};

class NcclCommunicator final : public DeviceCommunicator {
 public:
  NcclCommunicator(std::unique_ptr<Communicator> host, std::shared_ptr<kernels::Compute> compute,
                   const CommOptions& options)
      : DeviceCommunicator(std::move(host), std::move(compute), options),
        groups_(std::make_shared<NcclGroups>(this->host(), options)),
        watchdog_(*groups_, this->host(), this->compute().device(), options.timeout_s,
                  [this](const Tag& tag, const std::string& why) { give_up(tag, why); }) {
    groups_->of(world());
  }
  ~NcclCommunicator() override {
    // What is under way uses memory and communicators that end with this object.
    try {
      if (!aborted_.load()) wait_on_host(begun_.count, this->options().peer_timeout_s);
    } catch (const std::exception&) {
      groups_->abort_all();
    }
    watchdog_.stop();
  }

  std::shared_ptr<SymmetricMemory> allocate(size_t bytes, std::string_view label) override {
    throw_if_aborted();
    std::shared_ptr<NcclMemory> memory;
    const uint32_t id = ++allocations_;
    agree_on_memory([&] { memory = std::make_shared<NcclMemory>(groups_, id, bytes); }, bytes,
                    label);
    if (bytes > 0) compute().zero(memory->local(), bytes);
    live_.remove_if([](const std::weak_ptr<NcclMemory>& one) { return one.expired(); });
    live_.push_back(memory);
    return memory;
  }

  void allow_any_order(bool allowed) override { any_order_ = allowed; }

  Ticket begin_gather(const Group& group, SymmetricSpan source, std::byte* destination,
                      Tag tag) override {
    require_member(group, rank());
    NcclMemory& memory = memory_of(source);
    tag.kind = CollectiveKind::kGather;
    tag.bytes = static_cast<int64_t>(source.bytes);
    NcclGroup& members = groups_->of(group);
    groups_->make_known(members, memory.local(), memory.bytes());
    make_destination_known(members, destination);
    const NcclFlight& flight = start(tag, memory_handle(memory));
    const std::byte* const from = memory.local() + source.offset;
    if (members.members.size() == 1) {
      if (from != destination && source.bytes > 0)
        device::copy_async(destination, from, source.bytes, stream());
    } else if (source.bytes > 0) {
      groups_->run(members, "ncclAllGather", [&](void* comm) {
        return nccl().all_gather(from, destination, source.bytes, comm, stream().get());
      });
    }
    return end(flight);
  }

  Ticket begin_fold(const Group& group, SymmetricSpan source, DType dtype, int64_t begin,
                    std::span<float> destination, bool accumulate, Tag tag) override {
    require_member(group, rank());
    require_part(source, dtype, begin, destination);
    NcclMemory& memory = memory_of(source);
    tag.kind = CollectiveKind::kFold;
    tag.dtype = dtype;
    tag.bytes = static_cast<int64_t>(source.bytes);
    const FoldPlan& plan =
        plan_of(group, memory, source, dtype, {begin, static_cast<int64_t>(destination.size())});
    const NcclFlight& flight = start(tag, memory_handle(memory));
    const std::byte* const from = memory.local() + source.offset;
    if (any_order_ && !plan.tiles.scatter.empty()) {
      fold_by_scatter(plan, memory, from, destination, accumulate);
    } else {
      fold_in_order(plan, memory, from, destination, accumulate);
    }
    return end(flight);
  }

  Ticket begin_fence(const Group& group, Tag tag) override {
    throw_if_aborted();
    host().finish(host().begin_fence(group, tag));
    return {};
  }

  void finish(Ticket ticket) override {
    check(ticket.sequence <= begun_.count, "a ticket of another communicator");
    if (ticket.sequence <= finished_) return;
    throw_if_aborted();
    device::wait_event(compute().stream(), watchdog_.at(ticket.sequence).done.get());
    finished_ = ticket.sequence;
  }
  /// NCCL is through with a source when its own collective is.
  void wait_released(Ticket ticket) override { finish(ticket); }

  void exchange(const void* mine, size_t bytes, void* all, Tag tag) override {
    throw_if_aborted();
    const size_t item = sizeof(Begun) + bytes;
    message_.resize(item);
    messages_.resize(item * static_cast<size_t>(size()));
    std::memcpy(message_.data(), &begun_, sizeof(Begun));
    if (bytes > 0) std::memcpy(message_.data() + sizeof(Begun), mine, bytes);
    host().exchange(message_.data(), item, messages_.data(), tag);
    for (int peer = 0; peer < size(); ++peer) {
      const std::byte* const from = messages_.data() + item * static_cast<size_t>(peer);
      compare(peer, from, tag);
      if (bytes > 0)
        std::memcpy(static_cast<std::byte*>(all) + bytes * static_cast<size_t>(peer),
                    from + sizeof(Begun), bytes);
    }
  }
  void broadcast(void* data, size_t bytes, int root, Tag tag) override {
    throw_if_aborted();
    host().broadcast(data, bytes, root, tag);
  }
  void barrier(Tag tag) override {
    throw_if_aborted();
    host().barrier(tag);
  }
  void abort(std::string_view reason) noexcept override {
    set_aborted(std::string(reason));
    host().abort(reason);
    groups_->abort_all();
  }

 private:
  static NcclMemory& memory_of(const SymmetricSpan& source) {
    auto* memory = dynamic_cast<NcclMemory*>(source.memory);
    check(memory != nullptr, "a collective's source is not memory of this communicator");
    require_source(source);
    return *memory;
  }

  std::shared_ptr<NcclMemory> memory_handle(const NcclMemory& memory) const {
    for (const std::weak_ptr<NcclMemory>& one : live_) {
      const std::shared_ptr<NcclMemory> held = one.lock();
      if (held.get() == &memory) return held;
    }
    return nullptr;
  }

  void make_destination_known(NcclGroup& group, const std::byte* destination) {
    for (const std::weak_ptr<NcclMemory>& one : live_) {
      const std::shared_ptr<NcclMemory> memory = one.lock();
      if (!memory || destination < memory->local() ||
          destination >= memory->local() + memory->bytes())
        continue;
      groups_->make_known(group, memory->local(), memory->bytes());
    }
  }

  /// Makes the communication stream wait for what is enqueued so far.
  const NcclFlight& start(const Tag& tag, std::shared_ptr<void> keep) {
    throw_if_aborted();
    if (begun_.count >= kNcclFlights) {
      const uint64_t oldest = begun_.count + 1 - kNcclFlights;
      finish({oldest});
      wait_on_host(oldest);
    }
    begun_.add(tag);
    const NcclFlight& flight = watchdog_.start(begun_.count, tag, std::move(keep));
    device::record_event(flight.ready.get(), compute().stream());
    stream().wait(flight.ready);
    return flight;
  }

  Ticket end(const NcclFlight& flight) {
    flight.done.record(stream());
    watchdog_.begun(begun_.count);
    return {begun_.count};
  }

  void wait_on_host(uint64_t sequence, double limit_s = 0) {
    using Clock = std::chrono::steady_clock;
    const auto begin = Clock::now();
    while (sequence > 0 && !watchdog_.at(sequence).done.done()) {
      throw_if_aborted();
      if (limit_s > 0 && std::chrono::duration<double>(Clock::now() - begin).count() > limit_s)
        throw CommError("[comm] nccl: the device is not through");
      NcclWatchdog::rest();
    }
  }

  /// The ranks tell each other their parts at a source's first fold.
  const FoldPlan& plan_of(const Group& group, const NcclMemory& memory, const SymmetricSpan& source,
                          DType dtype, const FoldPart& part) {
    const auto own =
        static_cast<size_t>(std::lower_bound(group.begin(), group.end(), rank()) - group.begin());
    for (const FoldPlan& plan : plans_) {
      if (plan.memory != memory.id() || plan.offset != source.offset ||
          plan.bytes != source.bytes || plan.dtype != dtype || plan.group != group)
        continue;
      if (plan.parts[own] != part) {
        throw CommError(cat("[comm] nccl: rank ", rank(), " wants elements [", part.begin, ", +",
                            part.count, ") of a fold's source, before it was [",
                            plan.parts[own].begin, ", +", plan.parts[own].count,
                            "): parts may not change"));
      }
      return plan;
    }
    FoldPlan plan{.group = group,
                  .memory = memory.id(),
                  .offset = source.offset,
                  .bytes = source.bytes,
                  .dtype = dtype};
    std::vector<FoldPart> all(static_cast<size_t>(size()));
    host().exchange(&part, sizeof(part), all.data(), make_tag("parts of a fold"));
    for (const int member : group) plan.parts.push_back(all[static_cast<size_t>(member)]);
    plan.tiles = tiles_of(group, plan.parts,
                          static_cast<int64_t>(source.bytes / dtype_bytes(dtype)), rank());
    plans_.push_back(std::move(plan));
    return plans_.back();
  }

  /// Memory of the communication stream: each use is over when the next begins on it.
  std::byte* staging(size_t bytes) {
    if (staging_.empty() || staging_.back().bytes() < bytes) staging_.emplace_back(bytes);
    return staging_.back().data();
  }

  void fold_by_scatter(const FoldPlan& plan, NcclMemory& memory, const std::byte* from,
                       std::span<float> destination, bool accumulate) {
    NcclGroup& scatter = groups_->of(plan.tiles.scatter);
    NcclGroup& replicas = groups_->of(plan.tiles.replicas);
    groups_->make_known(scatter, memory.local(), memory.bytes());
    const size_t count = destination.size();
    const NcclType type = nccl_type(plan.dtype);
    const bool direct = plan.dtype == DType::kF32 && !accumulate;
    void* const sum =
        direct ? static_cast<void*>(destination.data()) : staging(count * dtype_bytes(plan.dtype));
    if (scatter.members.size() > 1) {
      groups_->run(scatter, "ncclReduceScatter", [&](void* comm) {
        return nccl().reduce_scatter(from, sum, count, type, comm, stream().get());
      });
    } else {
      device::copy_async(sum, from, count * dtype_bytes(plan.dtype), stream());
    }
    if (replicas.members.size() > 1) {
      groups_->run(replicas, "ncclAllReduce", [&](void* comm) {
        return nccl().all_reduce(sum, sum, count, type, comm, stream().get());
      });
    }
    const void* const sums = sum;
    if (!direct)
      fold_on_stream(destination.data(), {&sums, 1}, plan.dtype, static_cast<int64_t>(count),
                     accumulate);
  }

  /// Every member sends each other its part, and adds what it gets in rank order.
  void fold_in_order(const FoldPlan& plan, NcclMemory& memory, const std::byte* from,
                     std::span<float> destination, bool accumulate) {
    NcclGroup& members = groups_->of(plan.group);
    groups_->make_known(members, memory.local(), memory.bytes());
    const size_t item = dtype_bytes(plan.dtype);
    const size_t own_bytes = destination.size() * item;
    const auto own = static_cast<size_t>(
        std::lower_bound(plan.group.begin(), plan.group.end(), rank()) - plan.group.begin());
    std::byte* const received = staging(own_bytes * plan.group.size());
    sources_.clear();
    const std::byte* mine = from + plan.parts[own].begin * static_cast<int64_t>(item);
    if (static_cast<const void*>(mine) == destination.data()) {  // More than one launch may write.
      device::copy_async(received + own_bytes * own, mine, own_bytes, stream());
      mine = received + own_bytes * own;
    }
    for (size_t m = 0; m < plan.group.size(); ++m)
      sources_.push_back(m == own ? mine : received + own_bytes * m);
    if (plan.group.size() > 1) {
      groups_->run(members, "sending parts",
                   [&](void* comm) { return send_parts(plan, from, received, own, item, comm); });
    }
    fold_on_stream(destination.data(), sources_, plan.dtype,
                   static_cast<int64_t>(destination.size()), accumulate);
  }

  int send_parts(const FoldPlan& plan, const std::byte* from, std::byte* received, size_t own,
                 size_t item, void* comm) const {
    const NcclTable& table = nccl();
    const size_t own_bytes = static_cast<size_t>(plan.parts[own].count) * item;
    int code = table.group_start();
    for (size_t m = 0; m < plan.group.size() && good(code); ++m) {
      if (m == own) continue;
      const FoldPart& theirs = plan.parts[m];
      const auto peer = static_cast<int>(m);
      if (theirs.count > 0) {
        code = table.send(from + theirs.begin * static_cast<int64_t>(item),
                          static_cast<size_t>(theirs.count) * item, peer, comm, stream().get());
      }
      if (own_bytes > 0 && good(code))
        code = table.receive(received + own_bytes * m, own_bytes, peer, comm, stream().get());
    }
    const int ended = table.group_end();
    return good(code) ? ended : code;
  }
  static bool good(int code) { return code == kNcclSuccess || code == kNcclInProgress; }

  void compare(int peer, const std::byte* message, Tag tag) {
    tag.kind = CollectiveKind::kExchange;
    Begun theirs;
    std::memcpy(static_cast<void*>(&theirs), message, sizeof(theirs));
    if (theirs.hash == begun_.hash && theirs.count == begun_.count) return;
    const auto about = [this](const Begun& begun) {
      return cat("had begun ", begun.count,
                 begun.count > 0 ? cat(", the last was ", named(begun.last)) : "");
    };
    const std::string text =
        cat("[comm] ranks ", rank(), " and ", peer, " began different collectives before ",
            describe_briefly(tag), ": rank ", rank(), " ", about(begun_), "; rank ", peer, " ",
            about(theirs), ". Hint: every rank must begin the same collectives in the same order.");
    abort(text);
    throw CommError(text);
  }

  /// From the watchdog's thread.
  void give_up(const Tag& tag, const std::string& why) {
    abort(cat("[comm] rank ", rank(), ", in ", named(tag), ": ", why));
  }

  void set_aborted(std::string reason) noexcept {
    const std::lock_guard lock(reason_mutex_);
    if (aborted_.load()) return;
    reason_ = std::move(reason);
    aborted_.store(true);
  }
  void throw_if_aborted() const {
    if (!aborted_.load()) return;
    const std::lock_guard lock(reason_mutex_);
    throw CommError(reason_.starts_with("[comm]") ? reason_ : cat("[comm] ", reason_));
  }

  std::shared_ptr<NcclGroups> groups_;
  bool any_order_ = false;
  uint32_t allocations_ = 0;
  std::list<std::weak_ptr<NcclMemory>> live_;
  Begun begun_;
  uint64_t finished_ = 0;
  std::list<FoldPlan> plans_;
  std::list<device::CudaBuffer> staging_;  // The last is the largest.
  std::vector<const void*> sources_;       // Of the fold that is enqueued.
  std::vector<std::byte> message_;
  std::vector<std::byte> messages_;
  mutable std::mutex reason_mutex_;
  std::string reason_;
  std::atomic<bool> aborted_ = false;
  NcclWatchdog watchdog_;  // The last: its thread uses the others.
};

}  // namespace

std::unique_ptr<Communicator> make_nccl(std::unique_ptr<Communicator> host,
                                        std::shared_ptr<kernels::Compute> compute,
                                        const CommOptions& options) {
  return std::make_unique<NcclCommunicator>(std::move(host), std::move(compute), options);
}

}  // namespace fsdp::comm
