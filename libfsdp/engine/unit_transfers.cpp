#include "libfsdp/engine/unit_transfers.h"

#include <algorithm>
#include <utility>

#include "libfsdp/base/error.h"

namespace fsdp::engine {
namespace {

size_t at(int index) { return static_cast<size_t>(index); }

}  // namespace

UnitTransfers::UnitTransfers(Storage& storage, const plan::Placement& placement,
                             comm::Communicator& comm, bool poison)
    : storage_(storage),
      placement_(placement),
      comm_(comm),
      poison_(poison),
      shard_group_(placement.mesh.shard_group(comm.rank())),
      replica_group_(placement.mesh.replica_group(comm.rank())),
      world_(placement.mesh.world()),
      contents_(storage.slots().slot_bytes.size()),
      gathers_(contents_.size()),
      holdable_(find_holdable()),
      held_(holdable_.size(), 0),
      staged_(storage.slots().stage_bytes.size()),
      stage_readers_(staged_.size()),
      sums_in_stage_(storage.slots().gradient_stage_bytes.size(), -1),
      has_sums_(storage.layout().units.size(), 0) {}

void UnitTransfers::begin_step() {
  std::fill(has_sums_.begin(), has_sums_.end(), uint8_t{0});
  std::fill(contents_.begin(), contents_.end(), Contents{});
  std::fill(staged_.begin(), staged_.end(), Contents{});
  std::fill(sums_in_stage_.begin(), sums_in_stage_.end(), -1);
}

UnitTransfers::Begun UnitTransfers::begin(plan::OpKind kind, int unit) {
  switch (kind) {
    case plan::OpKind::kFetch:
      return {.copy = begin_fetch(unit)};
    case plan::OpKind::kGather:
      return {.ticket = begin_gather(unit)};
    case plan::OpKind::kReduce:
      return {.ticket = begin_reduce(unit)};
    case plan::OpKind::kReduceOuter:
      return {.ticket = begin_reduce_outer(unit)};
    case plan::OpKind::kGatherOuter:
      return {.ticket = begin_gather_outer(unit)};
    case plan::OpKind::kFetchSums:
      return {.copy = begin_fetch_sums(unit)};
    case plan::OpKind::kStoreSums:
      return {.copy = begin_store_sums(unit)};
    default:
      throw InternalError(cat("a ", plan::op_name(kind), " is not begun beside the model"));
  }
}

bool UnitTransfers::holds(int unit) const {
  const int slot = storage_.slots().slot[at(unit)];
  if (slot < 0) return true;
  const Contents& now = contents_[at(slot)];
  return now.unit == unit && now.version == version_;
}

std::vector<uint8_t> UnitTransfers::find_holdable() const {
  std::vector<int> units(storage_.slots().slot_bytes.size());  // By slot: that lie there in turn.
  for (const int slot : storage_.slots().slot)
    if (slot >= 0) ++units[at(slot)];
  std::vector<uint8_t> holdable;
  for (const plan::Bucket& bucket : storage_.layout().buckets) {
    const int slot = storage_.slots().slot[at(bucket.unit)];
    holdable.push_back(!bucket.trainable && slot >= 0 && units[at(slot)] == 1);
  }
  return holdable;
}

bool UnitTransfers::is_held(int unit) const {
  const std::vector<int>& buckets = storage_.layout().of_unit[at(unit)];
  return std::all_of(buckets.begin(), buckets.end(), [this](int b) { return held_[at(b)] != 0; });
}

uint64_t UnitTransfers::begin_fetch(int unit) {
  const size_t stage = at(storage_.slots().stage[at(unit)]);
  if (is_held(unit)) return 0;
  if (staged_[stage].unit == unit && staged_[stage].version == version_) return 0;
  comm_.wait_released(stage_readers_[stage]);  // It may have been no schedule that gathered.
  uint64_t copy = 0;
  for (const int b : storage_.layout().of_unit[at(unit)]) {
    const auto bytes = static_cast<size_t>(storage_.layout().buckets[at(b)].shard_bytes());
    copy = storage_.copies()->begin(storage_.stage(b), storage_.shard(b), bytes);
  }
  staged_[stage] = {.unit = unit, .version = version_};
  return copy;
}

comm::Ticket UnitTransfers::begin_gather(int unit) {
  const int slot = storage_.slots().slot[at(unit)];
  const int stage = storage_.slots().stage[at(unit)];
  if (stage >= 0 && !is_held(unit)) storage_.copies()->order(begin_fetch(unit));
  if (poison_) poison(slot);
  comm::Ticket last;
  for (const int b : storage_.layout().of_unit[at(unit)]) {
    if (std::exchange(held_[at(b)], holdable_[at(b)])) continue;
    last = comm_.begin_gather(shard_group_, storage_.shard_source(b), storage_.gathered(b),
                              comm::make_tag("gather", step_, unit));
  }
  contents_[at(slot)] = {.unit = unit, .version = version_};
  gathers_[at(slot)] = last;
  if (stage >= 0) stage_readers_[at(stage)] = last;
  return last;
}

comm::Ticket UnitTransfers::begin_reduce(int unit) {
  comm::Ticket last;
  const bool sharded = placement_.accumulation == plan::Accumulation::kSharded;
  if (sharded && storage_.copies()) storage_.copies()->order(begin_fetch_sums(unit));
  // Not what the operation says: after a change of schedule in mid-step another one began the sum.
  const bool accumulate = sharded && std::exchange(has_sums_[at(unit)], uint8_t{1}) != 0;
  const int coordinate = placement_.mesh.shard_coordinate(comm_.rank());
  const bool two_level = placement_.reduction == plan::Reduction::kTwoLevel;
  const std::vector<int>& members = two_level ? shard_group_ : world_;
  for (const int b : storage_.layout().of_unit[at(unit)]) {
    const plan::Bucket& bucket = storage_.layout().buckets[at(b)];
    if (!bucket.trainable) continue;
    last = comm_.begin_fold(members, storage_.gradient_source(b), bucket.reduce_dtype,
                            coordinate * bucket.shard_numel, storage_.sums(b), accumulate,
                            comm::make_tag("reduce", step_, unit));
  }
  return last;
}

// Each replica sums a part of what the others have too.
comm::Ticket UnitTransfers::begin_reduce_outer(int unit) {
  comm::Ticket last;
  const int replica = placement_.mesh.replicate_coordinate(comm_.rank());
  for (const int b : storage_.layout().of_unit[at(unit)]) {
    const plan::Bucket& bucket = storage_.layout().buckets[at(b)];
    if (!bucket.trainable) continue;
    const int64_t part = plan::outer_part_numel(bucket, placement_.mesh);
    const comm::SymmetricSpan outer = storage_.outer_source(b);
    auto* const sums = reinterpret_cast<float*>(outer.memory->local() + outer.offset);
    last = comm_.begin_fold(replica_group_, storage_.sums_source(b), DType::kF32, replica * part,
                            {sums, static_cast<size_t>(part)}, false,
                            comm::make_tag("reduce outer", step_, unit));
  }
  return last;
}

comm::Ticket UnitTransfers::begin_gather_outer(int unit) {
  comm::Ticket last;
  for (const int b : storage_.layout().of_unit[at(unit)]) {
    if (!storage_.layout().buckets[at(b)].trainable) continue;
    const comm::SymmetricSpan sums = storage_.sums_source(b);
    last = comm_.begin_gather(replica_group_, storage_.outer_source(b),
                              sums.memory->local() + sums.offset,
                              comm::make_tag("gather outer", step_, unit));
  }
  return last;
}

uint64_t UnitTransfers::copy_sums(int unit, bool to_host) {
  uint64_t copy = 0;
  for (const int b : storage_.layout().of_unit[at(unit)]) {
    if (!storage_.layout().buckets[at(b)].trainable) continue;
    float* const host = storage_.gradient_shard(b).data();
    const std::span<float> stage = storage_.sums(b);
    copy = storage_.copies()->begin(to_host ? host : stage.data(), to_host ? stage.data() : host,
                                    stage.size_bytes());
  }
  return copy;
}

// Not what the schedule says: after a change of it in mid-step others may lie in the stage.
uint64_t UnitTransfers::begin_fetch_sums(int unit) {
  int& held = sums_in_stage_[at(storage_.slots().gradient_slot[at(unit)])];
  const bool there = std::exchange(held, unit) == unit;
  return there || !has_sums_[at(unit)] ? 0 : copy_sums(unit, /*to_host=*/false);
}

uint64_t UnitTransfers::begin_store_sums(int unit) { return copy_sums(unit, /*to_host=*/true); }

void UnitTransfers::gather_on_demand(int unit) {
  const int slot = storage_.slots().slot[at(unit)];
  if (slot < 0) return;
  if (!holds(unit)) begin_gather(unit);
  comm_.finish(gathers_[at(slot)]);
}

void UnitTransfers::empty_stages() {
  if (!storage_.copies()) return;
  for (const int unit : sums_in_stage_)
    if (unit >= 0 && has_sums(unit)) begin_store_sums(unit);
  storage_.copies()->synchronize();
}

void UnitTransfers::parameters_changed() {
  ++version_;
  if (placement_.home != plan::Home::kShared) return;
  comm_.finish(comm_.begin_fence(shard_group_, comm::make_tag("fence", step_)));
}

void UnitTransfers::publish() {
  std::fill(held_.begin(), held_.end(), uint8_t{0});
  parameters_changed();
}

void UnitTransfers::poison(int slot) {
  const std::span<std::byte> memory = storage_.slot(slot);
  storage_.compute().poison(memory.data(), memory.size());
  for (size_t b = 0; b < held_.size(); ++b)
    if (storage_.slots().slot[at(storage_.layout().buckets[b].unit)] == slot) held_[b] = 0;
}

void UnitTransfers::poison_slots() {
  for (size_t slot = 0; slot < contents_.size(); ++slot) poison(static_cast<int>(slot));
}

}  // namespace fsdp::engine
