#include "libfsdp/comm/host/peer_communicator.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/agreement.h"
#include "libfsdp/comm/collective_checks.h"
#include "libfsdp/comm/control/rank_state.h"
#include "libfsdp/comm/host/stream_copy.h"
#include "libfsdp/kernels/fold.h"

namespace fsdp::comm {
namespace {

constexpr int kSliceMs = 100;  // The longest sleep between two looks at the peers' health.
// Before a wait sleeps. About what a sleep and its wake cost, so waiting costs at most twice what
// is unavoidable. With more ranks than cores it would take the core from who is waited for, so
// there it is 0.
constexpr double kSpinSeconds = 10e-6;

constexpr size_t kStreamBytes =
    16 << 20;  // Larger gathers do not stay in a core's share of the caches.

// Large folds go in pieces, and give back each piece's pages of the peers: those would count as
// this rank's, for good. Smaller ones come too often for that. A piece is large enough for the sums
// to be stored past the caches.
constexpr size_t kLargeFoldBytes = 16 << 20;
constexpr size_t kFoldPieceNumel = 2 << 20;

SharedBlock& block_of(const SymmetricSpan& span) {
  auto* block = dynamic_cast<SharedBlock*>(span.memory);
  check(block != nullptr, "a collective's source is not memory of this communicator");
  require_source(span);
  return *block;
}

std::string no_sign_of_life(const CommOptions& options) {
  return cat("has shown no sign of life for ", options.peer_timeout_s,
             " s (stopped, or the host is out of memory)");
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

/// A collective that this rank has begun.
struct PeerCommunicator::Pending {
  Posted posted;
  Group members;
  std::shared_ptr<SharedBlock> memory;
  size_t offset = 0;
  size_t bytes = 0;                  // Of one member's contribution.
  std::byte* destination = nullptr;  // Gather, exchange, broadcast.
  size_t stride = 0;                 // Exchange: from one rank's data to the next.
  int half = 0;                      // Exchange, broadcast: of the staging memory.
  int64_t begin = 0;                 // Fold: first element.
  std::span<float> sums;
  bool accumulate = false;
};

PeerCommunicator::PeerCommunicator(std::shared_ptr<Mapping> keeper, ControlView control, int rank,
                                   const CommOptions& options)
    : keeper_(std::move(keeper)),
      control_(control),
      rank_(rank),
      size_(control.size()),
      options_(options),
      spins_(static_cast<unsigned>(size_) <= std::thread::hardware_concurrency()),
      pending_(std::make_unique<std::array<Pending, kRing>>()),
      pulses_(static_cast<size_t>(size_)) {
  for (int peer = 0; peer < size_; ++peer) world_.push_back(peer);
  for (Pending& pending : *pending_) pending.members.reserve(size_);  // No heap in a collective.
  Presence absent = Presence::kAbsent;
  check(control_.rank(rank_).presence.compare_exchange_strong(absent, Presence::kJoined),
        cat("rank ", rank_, " joins the same world twice"));
}

PeerCommunicator::~PeerCommunicator() { leave(); }

void PeerCommunicator::leave() {
  RankControl& mine = control_.rank(rank_);
  mine.presence.store(Presence::kLeft, std::memory_order_seq_cst);
  mine.begun.wake();
  mine.finished.wake();
}

// ---- Beginning ----

PeerCommunicator::Pending& PeerCommunicator::post(CollectiveKind kind, DType dtype,
                                                  const Group& group, uint64_t offset,
                                                  uint32_t memory, int64_t bytes, Tag tag) {
  throw_if_aborted();
  const uint64_t sequence = begun_ + 1;
  Pending& pending = (*pending_)[sequence % kRing];
  if (sequence >
      kRing) {  // See Note [Sequence numbers]: the place must be free on all who read it.
    while (finished_ < sequence - kRing) finish_next();
    for (const int member : pending.members) {
      wait_for(control_.rank(member).finished, sequence - kRing, member, pending.posted.tag);
    }
  }
  require_member(group, rank_);
  tag.kind = kind;
  tag.dtype = dtype;
  tag.bytes = bytes;
  pending.members.assign(group.begin(), group.end());
  pending.posted = {sequence, group_key(group), offset, memory, tag};
  return pending;
}

void PeerCommunicator::publish(Pending& pending) {
  begun_ = pending.posted.sequence;
  RankControl& mine = control_.rank(rank_);
  mine.ring[begun_ % kRing] = pending.posted;
  mine.begun.set(begun_);
}

Ticket PeerCommunicator::begin_gather(const Group& group, SymmetricSpan source,
                                      std::byte* destination, Tag tag) {
  SharedBlock& block = block_of(source);
  Pending& pending = post(CollectiveKind::kGather, tag.dtype, group, source.offset, block.id(),
                          static_cast<int64_t>(source.bytes), tag);
  pending.memory = block.shared_from_this();
  pending.offset = source.offset;
  pending.bytes = source.bytes;
  pending.destination = destination;
  publish(pending);
  return {begun_};
}

Ticket PeerCommunicator::begin_fold(const Group& group, SymmetricSpan source, DType dtype,
                                    int64_t begin, std::span<float> destination, bool accumulate,
                                    Tag tag) {
  SharedBlock& block = block_of(source);
  require_part(source, dtype, begin, destination);
  Pending& pending = post(CollectiveKind::kFold, dtype, group, source.offset, block.id(),
                          static_cast<int64_t>(source.bytes), tag);
  pending.memory = block.shared_from_this();
  pending.offset = source.offset;
  pending.bytes = source.bytes;
  pending.begin = begin;
  pending.sums = destination;
  pending.accumulate = accumulate;
  publish(pending);
  return {begun_};
}

Ticket PeerCommunicator::begin_fence(const Group& group, Tag tag) {
  Pending& pending = post(CollectiveKind::kFence, DType::kU8, group, 0, 0, 0, tag);
  pending.bytes = 0;
  publish(pending);
  return {begun_};
}

// ---- Finishing ----

void PeerCommunicator::finish(Ticket ticket) {
  check(ticket.sequence <= begun_, "a ticket of another communicator");
  if (ticket.sequence == 0) return;
  throw_if_aborted();
  while (finished_ < ticket.sequence) finish_next();
}

void PeerCommunicator::wait_released(Ticket ticket) {
  finish(ticket);
  // Older tickets were waited for when their place in the ring was used again.
  if (ticket.sequence == 0 || begun_ - ticket.sequence >= kRing) return;
  const Pending& pending = (*pending_)[ticket.sequence % kRing];
  for (const int member : pending.members) {
    wait_for(control_.rank(member).finished, ticket.sequence, member, pending.posted.tag);
  }
}

void PeerCommunicator::finish_next() {
  Pending& pending = (*pending_)[(finished_ + 1) % kRing];
  for (const int member : pending.members) {
    if (member == rank_) continue;
    wait_for(control_.rank(member).begun, pending.posted.sequence, member, pending.posted.tag);
    compare(pending, member);
  }
  move_data(pending);
  pending.memory.reset();
  ++finished_;
  control_.rank(rank_).finished.set(finished_);
}

void PeerCommunicator::compare(const Pending& pending, int member) {
  const Posted& mine = pending.posted;
  const Posted& theirs = control_.rank(member).ring[mine.sequence % kRing];
  const std::string text = difference(rank_, mine, member, theirs,
                                      [this](int32_t unit) { return control_.unit_name(unit); });
  if (!text.empty()) fail(text);
}

void PeerCommunicator::move_data(Pending& pending) {
  if (pending.bytes == 0) return;
  switch (pending.posted.tag.kind) {
    case CollectiveKind::kGather:
      return gather(pending);
    case CollectiveKind::kFold:
      return fold(pending);
    case CollectiveKind::kBarrier:
    case CollectiveKind::kFence:
      return;
    case CollectiveKind::kBroadcast: {
      const auto root = static_cast<int>(pending.posted.offset);
      if (root != rank_)
        std::memcpy(pending.destination, control_.staging(root, pending.half), pending.bytes);
      return;
    }
    case CollectiveKind::kExchange:
    case CollectiveKind::kAllocate:
    case CollectiveKind::kAllocateShared:
      for (const int member : pending.members) {
        std::memcpy(pending.destination + pending.stride * member,
                    control_.staging(member, pending.half), pending.bytes);
      }
      return;
  }
}

void PeerCommunicator::gather(const Pending& pending) {
  const size_t members = pending.members.size();
  const size_t own = std::lower_bound(pending.members.begin(), pending.members.end(), rank_) -
                     pending.members.begin();
  for (size_t i = 0; i < members; ++i) {
    const size_t at =
        (own + i) %
        members;  // Each starts elsewhere, so that not all read the same memory at once.
    const std::byte* source = pending.memory->peer(pending.members[at]) + pending.offset;
    std::byte* destination = pending.destination + pending.bytes * at;
    if (source == destination) continue;
    if (pending.bytes * members >= kStreamBytes) {
      stream_copy(destination, source, pending.bytes);
    } else {
      std::memcpy(destination, source, pending.bytes);
    }
  }
}

void PeerCommunicator::fold(const Pending& pending) {
  const size_t item = dtype_bytes(pending.posted.tag.dtype), all = pending.sums.size();
  const size_t first = pending.offset + static_cast<size_t>(pending.begin) * item;
  const bool large = all * item >= kLargeFoldBytes;
  const size_t piece = large ? kFoldPieceNumel : all;
  for (size_t at = 0; at < all; at += piece) {
    const std::span<float> sums = pending.sums.subspan(at, std::min(piece, all - at));
    const size_t offset = first + at * item;
    std::array<const void*, kMaxRanks> sources;
    for (size_t i = 0; i < pending.members.size(); ++i)
      sources[i] = pending.memory->peer(pending.members[i]) + offset;
    kernels::fold_ranks(sums.data(), {sources.data(), pending.members.size()},
                        pending.posted.tag.dtype, static_cast<int64_t>(sums.size()),
                        pending.accumulate);
    if (!large) continue;
    for (const int member : pending.members)
      pending.memory->parts[member]->forget(offset, sums.size() * item);
  }
}

// ---- Small data through the staging memory ----

// Note [Two halves] The half that is written now was last read two staged collectives ago. This
// rank has finished the one in between, so all ranks had begun that, and a rank begins a staged
// collective only after it has finished the one before: nobody reads this half any more.
int PeerCommunicator::next_staging_half() { return static_cast<int>(staging_uses_++ % 2); }

void PeerCommunicator::exchange(const void* mine, size_t bytes, void* all, Tag tag) {
  run_exchange(CollectiveKind::kExchange, mine, bytes, all, static_cast<int64_t>(bytes), tag);
}

void PeerCommunicator::run_exchange(CollectiveKind kind, const void* mine, size_t bytes, void* all,
                                    int64_t tag_bytes, Tag tag) {
  size_t at = 0;
  do {
    const size_t chunk = std::min(kStagingBytes, bytes - at);
    Pending& pending = post(kind, DType::kU8, world_, at, 0, tag_bytes, tag);
    pending.half = next_staging_half();
    if (chunk != 0)
      std::memcpy(control_.staging(rank_, pending.half), static_cast<const std::byte*>(mine) + at,
                  chunk);
    pending.bytes = chunk;
    pending.stride = bytes;
    pending.destination = static_cast<std::byte*>(all) + at;
    publish(pending);
    finish({begun_});
    at += chunk;
  } while (at < bytes);
}

void PeerCommunicator::broadcast(void* data, size_t bytes, int root, Tag tag) {
  require_root(root, size_);
  size_t at = 0;
  do {
    const size_t chunk = std::min(kStagingBytes, bytes - at);
    Pending& pending = post(CollectiveKind::kBroadcast, DType::kU8, world_,
                            static_cast<uint64_t>(root), 0, static_cast<int64_t>(bytes), tag);
    pending.half = next_staging_half();
    pending.bytes = chunk;
    pending.destination = static_cast<std::byte*>(data) + at;
    if (rank_ == root && chunk != 0)
      std::memcpy(control_.staging(root, pending.half), pending.destination, chunk);
    publish(pending);
    finish({begun_});
    at += chunk;
  } while (at < bytes);
}

void PeerCommunicator::barrier(Tag tag) {
  Pending& pending = post(CollectiveKind::kBarrier, DType::kU8, world_, 0, 0, 0, tag);
  pending.bytes = 0;
  publish(pending);
  finish({begun_});
}

// ---- Memory ----

std::shared_ptr<SymmetricMemory> PeerCommunicator::allocate(size_t bytes, std::string_view label) {
  throw_if_aborted();
  auto block = std::make_shared<SharedBlock>(++allocations_, rank_, size_, bytes);
  do_and_agree(CollectiveKind::kAllocate, world_, bytes, label,
               [&] { block->parts[rank_] = create_part(block->id(), world_, bytes, label); });
  do_and_agree(CollectiveKind::kAllocate, world_, bytes, label, [&] {
    for (const int peer : world_) {
      if (peer != rank_) block->parts[peer] = attach_part(block->id(), peer, bytes, false);
    }
  });
  parts_settled(block->id());
  return block;
}

std::shared_ptr<SharedMemory> PeerCommunicator::allocate_shared(const Group& group, size_t bytes,
                                                                std::string_view label) {
  throw_if_aborted();
  require_member(group, rank_);
  const uint32_t id = ++allocations_;
  std::shared_ptr<Mapping> mapping;
  do_and_agree(CollectiveKind::kAllocateShared, group, bytes, label, [&] {
    if (group.front() == rank_) mapping = create_part(id, group, bytes, label);
  });
  do_and_agree(CollectiveKind::kAllocateShared, group, bytes, label, [&] {
    if (group.front() != rank_) mapping = attach_part(id, group.front(), bytes, true);
  });
  parts_settled(id);
  return std::make_shared<BlockHeldOnce>(std::move(mapping), bytes);
}

template <class Work>
void PeerCommunicator::do_and_agree(CollectiveKind kind, const Group& group, size_t bytes,
                                    std::string_view label, Work work) {
  std::string error;
  try {
    work();
  } catch (const HostResourceError& e) {
    error = e.what();
  }
  try {
    agree_on_memory(kind, error, group, bytes, label);
  } catch (const HostResourceError&) {
    parts_settled(allocations_);
    throw;
  }
}

void PeerCommunicator::agree_on_memory(CollectiveKind kind, const std::string& error,
                                       const Group& group, size_t bytes, std::string_view label) {
  struct State {
    uint64_t group = 0;
    std::array<char, 200> error{};
  };
  State mine;
  mine.group = group_key(group);
  std::memcpy(mine.error.data(), error.data(), std::min(error.size(), mine.error.size() - 1));
  std::vector<State> all(size_);
  run_exchange(kind, &mine, sizeof(mine), all.data(), static_cast<int64_t>(bytes), make_tag(label));
  for (const int member : group) {
    if (all[member].group == mine.group) continue;
    fail(cat("[comm] ranks ", rank_, " and ", member, " differ over who holds '", label, "': rank ",
             rank_, " gave the group ", group_text(mine.group), ", rank ", member, " ",
             group_text(all[member].group)));
  }
  std::vector<std::string_view> errors;
  for (const State& state : all) errors.emplace_back(state.error.data());
  throw_if_no_memory(errors, bytes, label);
}

// ---- Waiting ----

/// What one wait has seen of its peer so far.
struct PeerCommunicator::Watch {
  int member;
  const Tag& what;
  double last_look;
  double waited_s = 0;
  double still_s = 0;
  uint64_t heartbeat = 0;
};

void PeerCommunicator::wait_for(Signal& signal, uint64_t target, int member, const Tag& what) {
  if (signal.get() >= target) return;
  for (const double end = spins_ ? seconds_now() + kSpinSeconds : 0;
       spins_ && seconds_now() < end;) {
    for (int i = 0; i < 8; ++i) spin_pause();
    if (signal.get() >= target) return;
  }
  sleep_until(signal, target, member, what);
}

void PeerCommunicator::sleep_until(Signal& signal, uint64_t target, int member, const Tag& what) {
  struct Counted {
    explicit Counted(Signal& signal) : signal(signal) {
      signal.waiters.fetch_add(1, std::memory_order_seq_cst);
    }
    ~Counted() { signal.waiters.fetch_sub(1, std::memory_order_seq_cst); }
    Signal& signal;
  } counted(signal);
  Watch watch{member, what, seconds_now()};
  control_.set_waiting(rank_, member, target);  // Both signals count collectives.
  for (;;) {
    const uint64_t seen = signal.value.load(std::memory_order_seq_cst);
    if (seen >= target) return control_.set_not_waiting(rank_);
    look_after(watch, signal, target);
    signal.sleep(seen, kSliceMs);
  }
}

void PeerCommunicator::look_after(Watch& watch, Signal& signal, uint64_t target) {
  throw_if_aborted();
  const RankControl& peer = control_.rank(watch.member);
  if (peer.presence.load(std::memory_order_seq_cst) == Presence::kLeft && signal.get() < target) {
    fail_waiting(watch.member, watch.what, "has left: its part of the program has ended");
  }
  const double now = seconds_now();
  const double slice = now - watch.last_look;
  if (slice < 0.5e-3 * kSliceMs && watch.waited_s > 0) return;
  watch.last_look = now;
  // A long slice means that this process itself was stopped, maybe together with the peer: that
  // time does not count.
  const double counted = std::clamp(slice, 1e-9, 2e-3 * kSliceMs);
  watch.waited_s += counted;
  if (const std::string why = why_lost(watch.member); !why.empty() && signal.get() < target) {
    fail_waiting(watch.member, watch.what, why);
  }
  const uint64_t heartbeat = peer.heartbeat.load(std::memory_order_relaxed);
  watch.still_s = heartbeat == watch.heartbeat ? watch.still_s + counted : 0;
  watch.heartbeat = heartbeat;
  if (peers_have_heartbeats()) look_for_life(watch);
  if (watch.waited_s > options_.timeout_s) {
    // Whom this rank waits for may itself be kept waiting.
    const int late = end_of_waits(control_, watch.member, rank_);
    fail_waiting(
        late, watch.what,
        cat("did not come within ", options_.timeout_s, " s",
            late == watch.member ? "" : cat(" and keeps rank ", watch.member, " waiting")));
  }
}

void PeerCommunicator::look_for_life(const Watch& watch) {
  // A process that is still starting has no heartbeat yet.
  const bool absent = control_.rank(watch.member).presence.load() == Presence::kAbsent;
  if (absent && watch.waited_s > options_.join_timeout_s) {
    fail_waiting(watch.member, watch.what,
                 cat("did not join within ", options_.join_timeout_s, " s"));
  }
  if (!absent && watch.still_s > options_.peer_timeout_s) {
    fail_waiting(watch.member, watch.what, no_sign_of_life(options_));
  }
}

void PeerCommunicator::fail_waiting(int member, const Tag& what, const std::string& why) {
  const RankControl& peer = control_.rank(member);
  std::string doing = control_.progress(member);
  const uint64_t last = peer.begun.get();
  if (last != 0)
    doing += cat(doing.empty() ? "" : ", ", "its last collective was ",
                 named(peer.ring[last % kRing].tag));
  const std::string others = describe_others(control_, {member, rank_});
  fail(cat("[comm] rank ", member, " ", why, "; rank ", rank_, " waited for it in ", named(what),
           doing.empty() ? "" : cat(" (rank ", member, ": ", doing, ")"),
           others.empty() ? "" : cat("\n", kStatesTitle, others)),
       member);
}

std::string PeerCommunicator::failure() {
  if (control_.aborted()) return control_.abort_text();
  const double now = seconds_now();
  // As in look_after.
  const double slice_s = std::clamp(now - last_failure_look_, 0.0, 2e-3 * kSliceMs);
  last_failure_look_ = now;
  for (const int member : world_) {
    if (member == rank_) continue;
    if (const std::string why = why_absent(member, slice_s); !why.empty())
      return cat("rank ", member, " ", why);
  }
  return {};
}

std::string PeerCommunicator::why_absent(int member, double slice_s) {
  const RankControl& peer = control_.rank(member);
  const Presence presence = peer.presence.load(std::memory_order_seq_cst);
  if (presence == Presence::kLeft) return "has left: its part of the program has ended";
  if (std::string why = why_lost(member); !why.empty()) return why;
  if (!peers_have_heartbeats() || presence != Presence::kJoined) return {};
  Pulse& pulse = pulses_[static_cast<size_t>(member)];
  const uint64_t heartbeat = peer.heartbeat.load(std::memory_order_relaxed);
  pulse.still_s = heartbeat == pulse.heartbeat ? pulse.still_s + slice_s : 0;
  pulse.heartbeat = heartbeat;
  return pulse.still_s > options_.peer_timeout_s ? no_sign_of_life(options_) : "";
}

std::string PeerCommunicator::named(const Tag& tag) const {
  return describe(tag, control_.unit_name(tag.unit));
}

void PeerCommunicator::fail(const std::string& text, int lost) {
  control_.abort(rank_, text, lost);
  throw CommError(text);
}

void PeerCommunicator::throw_if_aborted() const {
  if (control_.aborted()) throw CommError(cat("[comm] ", control_.abort_text()));
}

void PeerCommunicator::abort(std::string_view reason) noexcept { control_.abort(rank_, reason); }

void PeerCommunicator::report_progress(int64_t step, std::string_view phase) {
  control_.set_progress(rank_, step, phase);
}

void PeerCommunicator::report_unit(int32_t unit) { control_.set_unit(rank_, unit); }

void PeerCommunicator::name_units(std::span<const std::string> names) {
  if (rank_ == 0) control_.name_units(names);
}

}  // namespace fsdp::comm
