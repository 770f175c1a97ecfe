#include "libfsdp/gloo/gloo_communicator.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/agreement.h"
#include "libfsdp/comm/collective_checks.h"
#include "libfsdp/comm/control/control.h"
#include "libfsdp/comm/os/mapping.h"
#include "libfsdp/comm/os/quiet_thread.h"
#include "libfsdp/gloo/rank_signs.h"
#include "libfsdp/kernels/fold.h"

namespace fsdp::gloo {

using namespace comm;

namespace {

constexpr uint64_t kPlaces = 64;      // Collectives under way.
constexpr size_t kInlineBytes = 768;  // Of data in a message.
constexpr int kPostedAhead = 8;       // Receives for messages that wait for a peer to begin.
constexpr int kMessages = 1;          // Channels of the mesh.
constexpr int kData = 2;
constexpr double kGoodbyeSeconds = 60;
constexpr double kWordSeconds = 1.5;  // For the reason of a broken connection to come.

class OwnBlock final : public SymmetricMemory {
 public:
  OwnBlock(uint32_t id, std::shared_ptr<Mapping> mapping, size_t bytes)
      : id_(id), mapping_(std::move(mapping)), bytes_(bytes) {}
  size_t bytes() const override { return bytes_; }
  std::byte* local() override { return mapping_->data(); }
  const std::byte* peer(int) const override { return nullptr; }
  uint32_t id() const { return id_; }
  const std::shared_ptr<Mapping>& mapping() const { return mapping_; }

 private:
  uint32_t id_;
  std::shared_ptr<Mapping> mapping_;
  size_t bytes_;
};

OwnBlock& block_of(const SymmetricSpan& span) {
  auto* block = dynamic_cast<OwnBlock*>(span.memory);
  check(block != nullptr, "a collective's source is not memory of this communicator");
  require_source(span);
  return *block;
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

/// What begin tells each member.
struct GlooCommunicator::Message {
  Posted posted;
  int64_t part_begin = 0;  // Fold: the elements that this rank wants.
  int64_t part_numel = 0;
  std::array<std::byte, kInlineBytes> data;
};

struct GlooCommunicator::Pending {
  Message message;
  Group members;
  std::shared_ptr<Mapping> memory;  // Keeps the source.
  const std::byte* source = nullptr;
  std::byte* destination = nullptr;
  size_t bytes = 0;   // Of one member's contribution.
  size_t stride = 0;  // In the destination, from one member's data to the next.
  bool is_inline = false;
  std::span<float> sums;
  bool accumulate = false;
  Transfers sends;
  std::vector<int> sent_to;
  std::vector<Message> theirs;  // In group order; this rank's own is left as it is.
};

struct GlooCommunicator::Inbox {
  std::array<Message, kPostedAhead> messages;
  std::array<std::unique_ptr<Transfer>, kPostedAhead> receives;
  int next = 0;
};

// ---- Coming and going ----

GlooCommunicator::GlooCommunicator(const Place& place, const CommOptions& options,
                                   std::unique_ptr<ControlHub> hub,
                                   std::unique_ptr<Communicator> local)
    : rank_(place.rank),
      size_(place.size),
      options_(options),
      local_(std::move(local)),
      failures_(place.size),
      hub_(std::move(hub)),
      pending_(std::make_unique<std::array<Pending, kPlaces>>()),
      inboxes_(place.size) {
  for (int peer = 0; peer < size_; ++peer) world_.push_back(peer);
  control_ = std::make_unique<ControlChannel>(place.host, place.port, rank_, size_, place.token,
                                              place.join_timeout_s, options, events());
  control_->start();
  try {
    connect(place);
  } catch (const std::exception& e) {
    abort(e.what());
    close();
    throw;
  }
}

void GlooCommunicator::connect(const Place& place) {
  mesh_ = std::make_unique<Mesh>(*control_, rank_, size_, control_->address(), place.join_timeout_s,
                                 options_.peer_timeout_s * 0.8);
  for (const int peer : world_) {
    if (peer == rank_) continue;
    inboxes_[peer] = std::make_unique<Inbox>();
    for (int i = 0; i < kPostedAhead; ++i) post_receive(peer);
  }
  driver_ = start_quiet_thread([this] { drive_in_background(); });
  // Collective, so that nobody leaves while others still connect.
  ranks_per_host_ = agree_on_hosts(place);
}

int GlooCommunicator::agree_on_hosts(const Place& place) {
  struct Local {
    int rank;
    int size;
  };
  const Local mine{place.local_rank, place.local_size};
  std::vector<Local> all(size_);
  exchange(&mine, sizeof(mine), all.data(), make_tag("joined"));
  for (int rank = 0; rank < size_; ++rank) {
    const Local& one = all[rank];
    if (one.size != mine.size || one.size < 1 || one.rank != rank % one.size) return 1;
  }
  return size_ % mine.size == 0 ? mine.size : 1;
}

GlooCommunicator::~GlooCommunicator() { close(); }

void GlooCommunicator::close() {
  {
    const std::lock_guard lock(wake_mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  const bool failed = failures_.failed();
  if (finished_ < begun_) failures_.fail("[comm] this rank has left");
  if (driver_.joinable()) driver_.join();
  // The peers may still take what this rank has sent them.
  if (!failed) control_->leave(finished_, std::min(options_.timeout_s, kGoodbyeSeconds));
  control_->stop();
  for (Pending& pending : *pending_) pending.sends.clear();
  inboxes_.clear();
  mesh_.reset();
}

// ---- Beginning ----

GlooCommunicator::Pending& GlooCommunicator::post(CollectiveKind kind, DType dtype,
                                                  const Group& group, uint64_t offset,
                                                  uint32_t memory, int64_t bytes, Tag tag) {
  failures_.throw_if_failed();
  require_member(group, rank_);
  if (begun_ >= kPlaces) finish({begun_ + 1 - kPlaces});
  Pending& pending = (*pending_)[(begun_ + 1) % kPlaces];
  tag.kind = kind;
  tag.dtype = dtype;
  tag.bytes = bytes;
  pending.members.assign(group.begin(), group.end());
  pending.message.posted = {begun_ + 1, group_key(group), offset, memory, tag};
  pending.message.part_begin = 0;
  pending.message.part_numel = 0;
  pending.memory.reset();
  pending.source = nullptr;
  pending.destination = nullptr;
  pending.bytes = 0;
  pending.stride = 0;
  pending.is_inline = false;
  return pending;
}

Ticket GlooCommunicator::publish(Pending& pending, bool wake_driver) {
  begun_ = pending.message.posted.sequence;
  state_.begun = begun_;
  state_.last = pending.message.posted.tag;
  state_.finished = finished_;
  control_->report(state_);
  for (const int member : pending.members) {
    if (member == rank_) continue;
    pending.sends.push_back(
        start_send(member, kMessages, &pending.message, sizeof(pending.message), pending));
    pending.sent_to.push_back(member);
  }
  if (wake_driver) {
    {
      const std::lock_guard lock(wake_mutex_);
      wanted_ = begun_;
    }
    wake_.notify_one();
  }
  return {begun_};
}

Ticket GlooCommunicator::begin_gather(const Group& group, SymmetricSpan source,
                                      std::byte* destination, Tag tag) {
  OwnBlock& block = block_of(source);
  Pending& pending = post(CollectiveKind::kGather, tag.dtype, group, source.offset, block.id(),
                          static_cast<int64_t>(source.bytes), tag);
  pending.memory = block.mapping();
  pending.source = block.local() + source.offset;
  pending.destination = destination;
  pending.bytes = source.bytes;
  pending.stride = source.bytes;
  return publish(pending, true);
}

Ticket GlooCommunicator::begin_fold(const Group& group, SymmetricSpan source, DType dtype,
                                    int64_t begin, std::span<float> destination, bool accumulate,
                                    Tag tag) {
  OwnBlock& block = block_of(source);
  require_part(source, dtype, begin, destination);
  Pending& pending = post(CollectiveKind::kFold, dtype, group, source.offset, block.id(),
                          static_cast<int64_t>(source.bytes), tag);
  pending.memory = block.mapping();
  pending.source = block.local() + source.offset;
  pending.bytes = source.bytes;
  pending.sums = destination;
  pending.accumulate = accumulate;
  pending.message.part_begin = begin;
  pending.message.part_numel = static_cast<int64_t>(destination.size());
  return publish(pending, true);
}

Ticket GlooCommunicator::begin_fence(const Group& group, Tag tag) {
  return publish(post(CollectiveKind::kFence, DType::kU8, group, 0, 0, 0, tag), true);
}

void GlooCommunicator::exchange(const void* mine, size_t bytes, void* all, Tag tag) {
  exchange_as(CollectiveKind::kExchange, mine, bytes, all, static_cast<int64_t>(bytes), tag);
}

void GlooCommunicator::exchange_as(CollectiveKind kind, const void* mine, size_t bytes, void* all,
                                   int64_t tag_bytes, Tag tag) {
  Pending& pending = post(kind, DType::kU8, world_, 0, 0, tag_bytes, tag);
  pending.source = static_cast<const std::byte*>(mine);
  pending.destination = static_cast<std::byte*>(all);
  pending.bytes = bytes;
  pending.stride = bytes;
  pending.is_inline = bytes <= kInlineBytes;
  if (pending.is_inline && bytes != 0) std::memcpy(pending.message.data.data(), mine, bytes);
  finish(publish(pending, false));
}

void GlooCommunicator::broadcast(void* data, size_t bytes, int root, Tag tag) {
  require_root(root, size_);
  Pending& pending = post(CollectiveKind::kBroadcast, DType::kU8, world_,
                          static_cast<uint64_t>(root), 0, static_cast<int64_t>(bytes), tag);
  pending.source = static_cast<const std::byte*>(data);
  pending.destination = static_cast<std::byte*>(data);
  pending.bytes = bytes;
  finish(publish(pending, false));
}

void GlooCommunicator::barrier(Tag tag) {
  finish(publish(post(CollectiveKind::kBarrier, DType::kU8, world_, 0, 0, 0, tag), false));
}

// ---- Finishing ----

void GlooCommunicator::finish(Ticket ticket) {
  check(ticket.sequence <= begun_, "a ticket of another communicator");
  if (ticket.sequence == 0) return;
  failures_.throw_if_failed();
  drive_until(ticket.sequence);
}

void GlooCommunicator::drive_until(uint64_t sequence) {
  if (finished_ >= sequence) return;
  const std::lock_guard lock(driving_);
  while (finished_ < sequence) {
    failures_.throw_if_failed();
    drive_next();
  }
}

void GlooCommunicator::drive_in_background() {
  std::unique_lock lock(wake_mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return stop_ || wanted_ > finished_; });
    if (stop_) return;
    const uint64_t sequence = wanted_;
    lock.unlock();
    try {
      drive_until(sequence);
    } catch (const std::exception& e) {
      failures_.fail(e.what());
      return;  // The rank hears of it in its next call.
    }
    lock.lock();
  }
}

void GlooCommunicator::drive_next() {
  Pending& pending = (*pending_)[(finished_ + 1) % kPlaces];
  receive_messages(pending);
  move_data(pending);
  wait_all(pending.sends, pending.sent_to, pending);
  pending.sent_to.clear();
  pending.memory.reset();
  ++finished_;
}

void GlooCommunicator::post_receive(int peer) {
  Inbox& inbox = *inboxes_[peer];
  inbox.receives[inbox.next] =
      mesh_->receive(peer, kMessages, &inbox.messages[inbox.next], sizeof(Message));
  inbox.next = (inbox.next + 1) % kPostedAhead;
}

void GlooCommunicator::receive_messages(Pending& pending) {
  pending.theirs.resize(pending.members.size());
  for (size_t i = 0; i < pending.members.size(); ++i) {
    const int member = pending.members[i];
    if (member == rank_) continue;
    Inbox& inbox = *inboxes_[member];
    if (inbox.receives[inbox.next] == nullptr) {
      wait_for_word(member, "its connection is closed", pending);
      fail_waiting(member, pending.message.posted.tag);
    }
    wait(*inbox.receives[inbox.next], member, pending);
    pending.theirs[i] = inbox.messages[inbox.next];
    compare(pending, member, pending.theirs[i]);
    try {
      post_receive(member);
    } catch (const CommError&) {  // Whoever has left may break the connection; the next wait tells.
      inbox.receives[inbox.next].reset();
      inbox.next = (inbox.next + 1) % kPostedAhead;
    }
  }
}

void GlooCommunicator::compare(const Pending& pending, int member, const Message& theirs) {
  if (const std::string text = difference(rank_, pending.message.posted, member, theirs.posted,
                                          [this](int32_t unit) -> std::string_view {
                                            const auto at = static_cast<size_t>(unit);
                                            return at < unit_names_.size() ? unit_names_[at] : "";
                                          });
      !text.empty()) {
    fail(text);
  }
  if (theirs.posted.tag.kind != CollectiveKind::kFold) return;
  const auto element = static_cast<int64_t>(dtype_bytes(theirs.posted.tag.dtype));
  const int64_t numel = theirs.posted.tag.bytes / element;
  if (theirs.part_begin < 0 || theirs.part_numel < 0 || theirs.part_begin > numel ||
      theirs.part_numel > numel - theirs.part_begin) {
    fail(cat("[gloo] rank ", member, " asks for elements [", theirs.part_begin, ", +",
             theirs.part_numel, ") of ", numel, " in ", describe(theirs.posted.tag)));
  }
}

// ---- Moving data ----

void GlooCommunicator::move_data(Pending& pending) {
  if (pending.bytes == 0) return;
  switch (pending.message.posted.tag.kind) {
    case CollectiveKind::kGather:
    case CollectiveKind::kExchange:
    case CollectiveKind::kAllocate:
    case CollectiveKind::kAllocateShared:
      return gather(pending);
    case CollectiveKind::kFold:
      return fold(pending);
    case CollectiveKind::kBroadcast:
      return broadcast_from_root(pending);
    case CollectiveKind::kBarrier:
    case CollectiveKind::kFence:
      return;
  }
}

void GlooCommunicator::send(Pending& pending, int member, const std::byte* data, size_t bytes) {
  if (bytes == 0) return;
  pending.sends.push_back(start_send(member, kData, data, bytes, pending));
  pending.sent_to.push_back(member);
}

void GlooCommunicator::gather(Pending& pending) {
  const size_t members = pending.members.size();
  const size_t own = std::lower_bound(pending.members.begin(), pending.members.end(), rank_) -
                     pending.members.begin();
  Transfers receives;
  std::vector<int> from;
  for (size_t step = 1; step < members; ++step) {
    // Each starts elsewhere, so that not all send to the same rank at once.
    const size_t to = (own + step) % members;
    const size_t at = (own + members - step) % members;
    std::byte* destination = pending.destination + pending.stride * at;
    if (pending.is_inline) {
      std::memcpy(destination, pending.theirs[at].data.data(), pending.bytes);
      continue;
    }
    receives.push_back(start_receive(pending.members[at], destination, pending.bytes, pending));
    from.push_back(pending.members[at]);
    send(pending, pending.members[to], pending.source, pending.bytes);
  }
  std::byte* mine = pending.destination + pending.stride * own;
  if (mine != pending.source) std::memcpy(mine, pending.source, pending.bytes);
  wait_all(receives, from, pending);
}

void GlooCommunicator::fold(Pending& pending) {
  const DType dtype = pending.message.posted.tag.dtype;
  const size_t element = dtype_bytes(dtype);
  const size_t part_bytes = pending.sums.size() * element;
  const size_t room = (part_bytes + 63) / 64 * 64;
  if (parts_.size() < room * pending.members.size()) parts_.resize(room * pending.members.size());
  Transfers receives;
  std::vector<int> from;
  std::vector<const void*> sources;
  for (size_t i = 0; i < pending.members.size(); ++i) {
    const int member = pending.members[i];
    if (member == rank_) {
      sources.push_back(pending.source + pending.message.part_begin * element);
      continue;
    }
    sources.push_back(parts_.data() + room * i);
    if (part_bytes != 0) {
      receives.push_back(start_receive(member, parts_.data() + room * i, part_bytes, pending));
      from.push_back(member);
    }
    const Message& theirs = pending.theirs[i];
    send(pending, member, pending.source + theirs.part_begin * element,
         theirs.part_numel * element);
  }
  wait_all(receives, from, pending);
  kernels::fold_ranks(pending.sums.data(), sources, dtype,
                      static_cast<int64_t>(pending.sums.size()), pending.accumulate);
}

void GlooCommunicator::broadcast_from_root(Pending& pending) {
  const auto root = static_cast<int>(pending.message.posted.offset);
  if (root == rank_) {
    for (const int member : pending.members) {
      if (member != rank_) send(pending, member, pending.source, pending.bytes);
    }
    return;
  }
  const auto receive = start_receive(root, pending.destination, pending.bytes, pending);
  wait(*receive, root, pending);
}

// ---- Memory ----

std::shared_ptr<SymmetricMemory> GlooCommunicator::allocate(size_t bytes, std::string_view label) {
  failures_.throw_if_failed();
  std::string error;
  std::shared_ptr<Mapping> mapping;
  try {
    mapping = Mapping::anonymous(bytes);
  } catch (const HostResourceError& e) {
    error = e.what();
  }
  using Text = std::array<char, 200>;
  Text mine{};
  std::memcpy(mine.data(), error.data(), std::min(error.size(), mine.size() - 1));
  std::vector<Text> all(size_);
  exchange_as(CollectiveKind::kAllocate, mine.data(), mine.size(), all.data(),
              static_cast<int64_t>(bytes), make_tag(label));
  std::vector<std::string_view> errors;
  for (const Text& text : all) errors.emplace_back(text.data());
  throw_if_no_memory(errors, bytes, label);
  return std::make_shared<OwnBlock>(++allocations_, std::move(mapping), bytes);
}

std::shared_ptr<SharedMemory> GlooCommunicator::allocate_shared(const Group&, size_t,
                                                                std::string_view label) {
  throw InternalError(
      cat("internal error: '", label, "' cannot be held once by ranks of several hosts"));
}

// ---- Waiting and failing ----

void GlooCommunicator::wait_all(Transfers& transfers, const std::vector<int>& members,
                                const Pending& pending) {
  for (size_t i = 0; i < transfers.size(); ++i) wait(*transfers[i], members[i], pending);
  transfers.clear();
}

void GlooCommunicator::wait(Transfer& transfer, int member, const Pending& pending) {
  const Posted& posted = pending.message.posted;
  bool done = false;
  std::string broken;
  try {
    done = failures_.wait(transfer, member, posted.sequence, posted.tag);
  } catch (const CommError& e) {
    broken = e.what();
  }
  if (done) return;
  if (!broken.empty()) wait_for_word(member, broken, pending);
  fail_waiting(member, pending.message.posted.tag);
}

void GlooCommunicator::wait_for_word(int member, const std::string& broken,
                                     const Pending& pending) {
  for (const double end = seconds_now() + kWordSeconds; seconds_now() < end;) {
    if (failures_.is_hopeless(member, pending.message.posted.sequence)) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  failures_.note_lost(member, cat("cannot be reached any more: ", broken));
}

std::unique_ptr<Transfer> GlooCommunicator::start_send(int member, int channel, const void* data,
                                                       size_t bytes, const Pending& pending) {
  try {
    return mesh_->send(member, channel, data, bytes);
  } catch (const CommError& e) {
    wait_for_word(member, e.what(), pending);
    fail_waiting(member, pending.message.posted.tag);
  }
}

std::unique_ptr<Transfer> GlooCommunicator::start_receive(int member, void* data, size_t bytes,
                                                          const Pending& pending) {
  try {
    return mesh_->receive(member, kData, data, bytes);
  } catch (const CommError& e) {
    wait_for_word(member, e.what(), pending);
    fail_waiting(member, pending.message.posted.tag);
  }
}

ControlEvents GlooCommunicator::events() {
  ControlEvents events;
  events.aborted = [this](const std::string& text) { failures_.fail(cat("[comm] ", text)); };
  events.lost = [this](int rank, const std::string& why) { failures_.note_lost(rank, why); };
  events.left = [this](int rank, uint64_t begun) { failures_.note_left(rank, begun); };
  events.tick = [this] { look_at_clock(); };
  return events;
}

void GlooCommunicator::look_at_clock() {
  const std::optional<PeerFailures::Wait> wait = failures_.look();
  if (!wait) return control_->report_waiting(-1, {}, 0);
  control_->report_waiting(wait->member, wait->what, wait->waited_s);
  if (wait->waited_s > options_.timeout_s)
    failures_.note_lost(wait->member, cat("did not come within ", options_.timeout_s, " s"));
}

void GlooCommunicator::fail_waiting(int member, const Tag& what) {
  failures_.throw_if_failed();
  fail(cat("[comm] rank ", member, " ", failures_.why_lost(member), "; rank ", rank_,
           " waited for it in ", named(what),
           describe_signs(control_->signs_of_life(0.3), unit_names_, member, rank_)));
}

std::string GlooCommunicator::named(const Tag& tag) {
  const auto unit = static_cast<size_t>(tag.unit);
  return describe(tag, unit < unit_names_.size() ? unit_names_[unit] : "");
}

void GlooCommunicator::fail(const std::string& text) {
  failures_.fail(cat("[comm] rank ", rank_, " failed: ", text));
  abort(text);
  throw CommError(text);
}

void GlooCommunicator::abort(std::string_view reason) noexcept try {
  control_->abort(std::string(reason));  // Comes back as an event, unless the hub is gone.
  if (local_) local_->abort(reason);
  failures_.fail(cat("[comm] rank ", rank_, " failed: ", reason));
} catch (...) {  // Out of memory: the end of this process tells the others.
}

void GlooCommunicator::report_progress(int64_t step, std::string_view phase) {
  state_.step = step;
  std::memset(state_.phase, 0, sizeof(state_.phase));
  phase.copy(state_.phase, sizeof(state_.phase));
  control_->report(state_);
  if (local_) local_->report_progress(step, phase);
}

void GlooCommunicator::report_unit(int32_t unit) {
  state_.unit = unit;
  control_->report(state_);
  if (local_) local_->report_unit(unit);
}

void GlooCommunicator::name_units(std::span<const std::string> names) {
  unit_names_.assign(names.begin(), names.end());
  if (local_) local_->name_units(names);
}

}  // namespace fsdp::gloo
