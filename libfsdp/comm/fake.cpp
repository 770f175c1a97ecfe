#include "libfsdp/comm/fake.h"

#include <cstring>
#include <mutex>
#include <string>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/collective_checks.h"
#include "libfsdp/kernels/fold.h"

namespace fsdp::comm {
namespace {

constexpr int kMaxFakeRanks = 4096;

class OwnBlock final : public SymmetricMemory, public SharedMemory {
 public:
  OwnBlock(std::shared_ptr<Mapping> mapping, size_t bytes)
      : mapping_(std::move(mapping)), bytes_(bytes) {}
  size_t bytes() const override { return bytes_; }
  std::byte* local() override { return mapping_->data(); }
  std::byte* data() override { return mapping_->data(); }
  const std::byte* peer(int) const override { return mapping_->data(); }

 private:
  std::shared_ptr<Mapping> mapping_;
  size_t bytes_;
};

}  // namespace

struct FakeCommunicator::AbortReason {
  mutable std::mutex mutex;
  std::string text;
};

FakeCommunicator::FakeCommunicator(int rank, int size, const FakeOptions& options)
    : rank_(rank), size_(size), options_(options), abort_reason_(std::make_unique<AbortReason>()) {
  require(size >= 1 && size <= kMaxFakeRanks && rank >= 0 && rank < size, "fake rank ", rank,
          " of ", size);
  for (int peer = 0; peer < size; ++peer) world_.push_back(peer);
}

FakeCommunicator::~FakeCommunicator() = default;

const FakeCount& FakeCommunicator::count(CollectiveKind kind) const {
  return counts_[static_cast<size_t>(kind)];
}

FakeCount FakeCommunicator::total() const {
  FakeCount total;
  for (const FakeCount& one : counts_) {
    total.collectives += one.collectives;
    total.bytes += one.bytes;
  }
  return total;
}

Ticket FakeCommunicator::begin(CollectiveKind kind, const Group& group,
                               size_t bytes_from_each_peer) {
  throw_if_aborted();
  require_member(group, rank_);
  FakeCount& count = counts_[static_cast<size_t>(kind)];
  ++count.collectives;
  count.bytes += static_cast<int64_t>(bytes_from_each_peer * (group.size() - 1));
  return {++begun_};
}

std::shared_ptr<Mapping> FakeCommunicator::new_memory(CollectiveKind kind, size_t bytes,
                                                      std::string_view label) {
  begin(kind, world_, 0);
  try {
    return Mapping::anonymous(bytes);
  } catch (const HostResourceError& e) {
    throw HostResourceError(cat("[comm] no memory for '", label, "', ", bytes, " bytes:\n  rank ",
                                rank_, ": ", e.what()));
  }
}

std::shared_ptr<SymmetricMemory> FakeCommunicator::allocate(size_t bytes, std::string_view label) {
  return std::make_shared<OwnBlock>(new_memory(CollectiveKind::kAllocate, bytes, label), bytes);
}

std::shared_ptr<SharedMemory> FakeCommunicator::allocate_shared(const Group& group, size_t bytes,
                                                                std::string_view label) {
  require(options_.can_share, "ranks of several hosts cannot share memory");
  require_member(group, rank_);
  return std::make_shared<OwnBlock>(new_memory(CollectiveKind::kAllocateShared, bytes, label),
                                    bytes);
}

Ticket FakeCommunicator::begin_gather(const Group& group, SymmetricSpan source,
                                      std::byte* destination, Tag) {
  require_source(source);
  const Ticket ticket = begin(CollectiveKind::kGather, group, source.bytes);
  if (!options_.repeat_own_data || source.bytes == 0) return ticket;
  const std::byte* mine = source.memory->local() + source.offset;
  for (size_t i = 0; i < group.size(); ++i) {
    if (destination + source.bytes * i != mine)
      std::memcpy(destination + source.bytes * i, mine, source.bytes);
  }
  return ticket;
}

Ticket FakeCommunicator::begin_fold(const Group& group, SymmetricSpan source, DType dtype,
                                    int64_t begin_at, std::span<float> destination, bool accumulate,
                                    Tag) {
  require_source(source);
  require_part(source, dtype, begin_at, destination);
  const size_t part_bytes = destination.size() * dtype_bytes(dtype);
  const Ticket ticket = begin(CollectiveKind::kFold, group, part_bytes);
  const void* mine = source.memory->local() + source.offset + begin_at * dtype_bytes(dtype);
  kernels::fold_ranks(destination.data(), {&mine, 1}, dtype,
                      static_cast<int64_t>(destination.size()), accumulate);
  return ticket;
}

Ticket FakeCommunicator::begin_fence(const Group& group, Tag) {
  return begin(CollectiveKind::kFence, group, 0);
}

void FakeCommunicator::finish(Ticket ticket) {
  require(ticket.sequence <= begun_, "a ticket of another communicator");
  if (ticket.sequence != 0) throw_if_aborted();
}

void FakeCommunicator::exchange(const void* mine, size_t bytes, void* all, Tag) {
  begin(CollectiveKind::kExchange, world_, bytes);
  for (int rank = 0; rank < size_ && bytes != 0; ++rank)
    std::memcpy(static_cast<std::byte*>(all) + bytes * rank, mine, bytes);
}

void FakeCommunicator::broadcast(void*, size_t bytes, int root, Tag) {
  require_root(root, size_);
  begin(CollectiveKind::kBroadcast, world_, 0);
  if (root != rank_)
    counts_[static_cast<size_t>(CollectiveKind::kBroadcast)].bytes += static_cast<int64_t>(bytes);
}

void FakeCommunicator::barrier(Tag) { begin(CollectiveKind::kBarrier, world_, 0); }

void FakeCommunicator::abort(std::string_view reason) noexcept {
  const std::lock_guard lock(abort_reason_->mutex);
  if (abort_reason_->text.empty()) abort_reason_->text = cat("rank ", rank_, " failed: ", reason);
}

void FakeCommunicator::throw_if_aborted() const {
  const std::lock_guard lock(abort_reason_->mutex);
  if (!abort_reason_->text.empty()) throw CommError(cat("[comm] ", abort_reason_->text));
}

std::unique_ptr<FakeCommunicator> make_fake(int rank, int size, const FakeOptions& options) {
  return std::make_unique<FakeCommunicator>(rank, size, options);
}

}  // namespace fsdp::comm
