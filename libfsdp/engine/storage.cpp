#include "libfsdp/engine/storage.h"

#include <utility>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"

namespace fsdp::engine {
namespace {

constexpr int64_t kPage = plan::kSlotAlignment;
constexpr int kRoot = 0;

bool is_16_bit(DType dtype) { return dtype == DType::kBF16 || dtype == DType::kF16; }

bool has_remainder(const plan::Bucket& bucket, MasterPrecision precision) {
  return bucket.trainable && bucket.dtype == DType::kBF16 && precision == MasterPrecision::kSplit;
}

bool has_master(const plan::Bucket& bucket, MasterPrecision precision) {
  if (!bucket.trainable || !is_16_bit(bucket.dtype)) return false;
  return precision == MasterPrecision::kF32 || bucket.dtype == DType::kF16;
}

bool inside(const void* address, const std::byte* begin, int64_t bytes) {
  const auto* at = static_cast<const std::byte*>(address);
  return bytes > 0 && at >= begin && at < begin + bytes;
}

std::vector<int64_t> begins(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> begin = {0};
  for (const int64_t bytes : sizes) begin.push_back(begin.back() + bytes);
  return begin;
}

/// Hands out a block from front to back, in pages.
class Pages {
 public:
  Pages(std::byte* begin, int64_t bytes) : next_(begin), end_(begin + bytes) {}
  std::byte* take(int64_t bytes) {
    std::byte* const taken = next_;
    next_ += round_up(bytes, kPage);
    check(next_ <= end_, "the engine's memory is planned too small");
    return taken;
  }

 private:
  std::byte* next_;
  std::byte* end_;
};

template <class T>
int64_t page_bytes(const plan::Bucket& bucket) {
  return round_up(bucket.shard_numel * int64_t{sizeof(T)}, kPage);
}

}  // namespace

int64_t master_bytes(const plan::Bucket& bucket, MasterPrecision precision) {
  if (has_remainder(bucket, precision)) return page_bytes<uint16_t>(bucket);
  return has_master(bucket, precision) ? page_bytes<float>(bucket) : 0;
}

Storage::Storage(const plan::Layout& layout, const plan::Placement& placement,
                 comm::Communicator& comm, MasterPrecision precision)
    : layout_(layout),
      placement_(placement),
      slots_(plan::assign_slots(layout, placement)),
      coordinate_(placement.mesh.shard_coordinate(comm.rank())),
      places_(layout.buckets.size()),
      slot_begin_(begins(slots_.slot_bytes)),
      gradient_begin_(begins(slots_.gradient_slot_bytes)),
      stage_begin_(begins(slots_.stage_bytes)),
      gradient_stage_begin_(begins(slots_.gradient_stage_bytes)),
      compute_(&comm.compute()),
      home_(placement.offloads() ? &kernels::host_compute() : compute_) {
  if (offloads()) copies_ = compute_->make_copy_stream();
  place_buckets();
  allocate(comm, precision);
}

void Storage::place_buckets() {
  constexpr int64_t kFloat = sizeof(float);
  for (const std::vector<int>& buckets : layout_.of_unit) {
    Place next;  // Behind the unit's buckets so far.
    for (const int b : buckets) {
      const plan::Bucket& bucket = layout_.buckets[static_cast<size_t>(b)];
      next.shard_offset = shard_bytes_;
      next.sums_offset = sums_bytes_;
      places_[static_cast<size_t>(b)] = next;
      shard_bytes_ += shared() ? bucket.padded_bytes() : bucket.shard_bytes();
      next.in_slot += bucket.padded_bytes();
      next.in_stage += bucket.shard_bytes();
      if (!bucket.trainable) continue;
      const int64_t sums = plan::gradient_shard_numel(bucket, placement_) * kFloat;
      sums_bytes_ += sums;
      next.in_gradient_slot += bucket.gradient_bytes();
      next.in_gradient_stage += sums;
      next.in_outer_slot += plan::outer_part_numel(bucket, placement_.mesh) * kFloat;
    }
  }
}

void Storage::allocate_shards(comm::Communicator& comm) {
  const auto bytes = static_cast<size_t>(shard_bytes_);
  if (offloads()) return;  // At home.
  if (shared()) {
    shared_shards_ = comm.allocate_shared(placement_.mesh.shard_group(comm.rank()), bytes,
                                          "parameters of a shard group");
  } else {
    shards_ = comm.allocate(bytes, "parameter shards");
  }
}

bool Storage::sums_in_slot(int bucket) const {
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  if (placement_.mesh.replicate > 1 || offloads() || info.reduce_dtype != DType::kF32) return false;
  if (placement_.accumulation == plan::Accumulation::kUnsharded) return true;
  return info.unit == kRoot && !sums_apart_;
}

void Storage::keep_sums_apart() {
  if (std::exchange(sums_apart_, true)) return;
  int64_t bytes = 0;
  const auto needs_memory = [this](int bucket) {
    const auto b = static_cast<size_t>(bucket);
    return layout_.buckets[b].trainable && places_[b].gradient.empty() && !sums_in_slot(bucket);
  };
  for (const int b : layout_.of_unit[kRoot])
    if (needs_memory(b)) bytes += page_bytes<float>(layout_.buckets[static_cast<size_t>(b)]);
  apart_ = home_->allocate(static_cast<size_t>(bytes), "gradient shards of the root");
  allocated_bytes_ += bytes;
  Pages pages(apart_.get(), bytes);
  for (const int b : layout_.of_unit[kRoot]) {
    const plan::Bucket& bucket = layout_.buckets[static_cast<size_t>(b)];
    if (!needs_memory(b)) continue;
    places_[static_cast<size_t>(b)].gradient = {
        reinterpret_cast<float*>(pages.take(page_bytes<float>(bucket))),
        static_cast<size_t>(bucket.shard_numel)};
  }
}

bool Storage::sums_at_home(int bucket) const {
  if (!layout_.buckets[static_cast<size_t>(bucket)].trainable) return false;
  return offloads() || (!two_level() && !sums_in_slot(bucket));
}

int64_t Storage::home_bytes(MasterPrecision precision) const {
  int64_t bytes = offloads() ? round_up(shard_bytes_, kPage) : 0;
  for (size_t b = 0; b < layout_.buckets.size(); ++b) {
    const plan::Bucket& bucket = layout_.buckets[b];
    if (sums_at_home(static_cast<int>(b))) bytes += page_bytes<float>(bucket);
    bytes += master_bytes(bucket, precision);
  }
  return bytes;
}

void Storage::place_at_home(std::byte* memory, int64_t bytes, MasterPrecision precision) {
  Pages pages(memory, bytes);
  if (offloads()) offloaded_shards_ = pages.take(shard_bytes_);
  for (size_t b = 0; b < places_.size(); ++b) {
    const plan::Bucket& bucket = layout_.buckets[b];
    const auto floats = [&] {
      return reinterpret_cast<float*>(pages.take(page_bytes<float>(bucket)));
    };
    const auto numel = static_cast<size_t>(bucket.shard_numel);
    if (sums_at_home(static_cast<int>(b))) {
      places_[b].gradient = {floats(), numel};
    } else if (bucket.trainable && sums_memory_) {
      auto* const begin = sums_memory_->local() + places_[b].sums_offset;
      places_[b].gradient = {reinterpret_cast<float*>(begin), numel};
    }
    if (has_master(bucket, precision)) places_[b].master = floats();
    if (has_remainder(bucket, precision))
      places_[b].remainder = reinterpret_cast<uint16_t*>(pages.take(page_bytes<uint16_t>(bucket)));
  }
}

void Storage::allocate_transients(comm::Communicator& comm) {
  const auto symmetric = [&](int64_t bytes, std::string_view label) {
    return comm.allocate(static_cast<size_t>(bytes), label);
  };
  gradients_ = symmetric(gradient_begin_.back(), "gradient slots");
  if (offloads()) {
    stages_ = symmetric(stage_begin_.back(), "stages");
    gradient_stages_ = symmetric(gradient_stage_begin_.back(), "gradient stages");
  }
  if (two_level()) outer_ = symmetric(slots_.outer_bytes, "outer slot");
  // Transports of devices know their own memory best.
  if (compute_ != &kernels::host_compute()) {
    slots_memory_ = symmetric(slot_begin_.back(), "slots");
    slot_memory_ = slots_memory_->local();
  } else {
    local_slots_ = compute_->allocate(static_cast<size_t>(slot_begin_.back()), "slots");
    slot_memory_ = local_slots_.get();
  }
}

void Storage::allocate(comm::Communicator& comm, MasterPrecision precision) {
  allocate_shards(comm);
  allocate_transients(comm);
  const bool symmetric_sums = two_level() && !offloads();
  if (symmetric_sums)
    sums_memory_ = comm.allocate(static_cast<size_t>(sums_bytes_), "sums of replicas");
  const int64_t home = home_bytes(precision);
  home_memory_ = copies_ ? copies_->allocate_host(static_cast<size_t>(home), "offloaded state")
                         : home_->allocate(static_cast<size_t>(home), "masters and sums");
  place_at_home(home_memory_.get(), home, precision);
  offloaded_bytes_ = offloads() ? home : 0;
  allocated_bytes_ = transient_bytes() + (symmetric_sums ? sums_bytes_ : 0);
  if (!offloads()) allocated_bytes_ += home + shard_bytes_ / (shared() ? placement_.mesh.shard : 1);
}

int64_t Storage::transient_bytes() const {
  return slot_begin_.back() + gradient_begin_.back() + stage_begin_.back() +
         gradient_stage_begin_.back() + slots_.outer_bytes;
}

std::byte* Storage::shard(int bucket) {
  const int64_t offset = places_[static_cast<size_t>(bucket)].shard_offset;
  if (offloads()) return offloaded_shards_ + offset;
  if (!shared()) return shards_->local() + offset;
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  return shared_shards_->data() + offset + coordinate_ * info.shard_bytes();
}

std::byte* Storage::stage(int bucket) { return stages_->local() + shard_source(bucket).offset; }

comm::SymmetricSpan Storage::shard_source(int bucket) {
  const Place& place = places_[static_cast<size_t>(bucket)];
  int64_t offset = place.shard_offset;
  if (offloads()) {
    const int unit = layout_.buckets[static_cast<size_t>(bucket)].unit;
    const int stage = slots_.stage[static_cast<size_t>(unit)];
    offset = stage_begin_[static_cast<size_t>(stage)] + place.in_stage;
  }
  return {.memory = offloads() ? stages_.get() : shards_.get(),
          .offset = static_cast<size_t>(offset),
          .bytes = static_cast<size_t>(layout_.buckets[static_cast<size_t>(bucket)].shard_bytes())};
}

std::span<float> Storage::gradient_shard(int bucket) {
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  if (!info.trainable || !sums_in_slot(bucket))
    return places_[static_cast<size_t>(bucket)].gradient;
  auto* const whole = reinterpret_cast<float*>(gradient(bucket));
  return {whole + coordinate_ * info.shard_numel, static_cast<size_t>(info.shard_numel)};
}

std::span<float> Storage::sums(int bucket) {
  if (!offloads()) return gradient_shard(bucket);
  const comm::SymmetricSpan source = sums_source(bucket);
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  return {reinterpret_cast<float*>(source.memory->local() + source.offset),
          static_cast<size_t>(info.shard_numel)};
}

comm::SymmetricSpan Storage::sums_source(int bucket) {
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  const Place& place = places_[static_cast<size_t>(bucket)];
  int64_t offset = place.sums_offset;
  if (offloads()) {
    const int slot = slots_.gradient_slot[static_cast<size_t>(info.unit)];
    offset = gradient_stage_begin_[static_cast<size_t>(slot)] + place.in_gradient_stage;
  }
  const int64_t numel = plan::gradient_shard_numel(info, placement_);
  return {.memory = offloads() ? gradient_stages_.get() : sums_memory_.get(),
          .offset = static_cast<size_t>(offset),
          .bytes = static_cast<size_t>(numel) * sizeof(float)};
}

comm::SymmetricSpan Storage::outer_source(int bucket) {
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  return {
      .memory = outer_.get(),
      .offset = static_cast<size_t>(places_[static_cast<size_t>(bucket)].in_outer_slot),
      .bytes = static_cast<size_t>(plan::outer_part_numel(info, placement_.mesh)) * sizeof(float)};
}

std::byte* Storage::gathered(int bucket) {
  const Place& place = places_[static_cast<size_t>(bucket)];
  if (shared()) return shared_shards_->data() + place.shard_offset;
  const int unit = layout_.buckets[static_cast<size_t>(bucket)].unit;
  const int in = slots_.slot[static_cast<size_t>(unit)];
  return in < 0 ? shard(bucket) : slot(in).data() + place.in_slot;
}

std::byte* Storage::gradient_slot(int slot) {
  return gradients_->local() + gradient_begin_[static_cast<size_t>(slot)];
}

std::byte* Storage::gradient(int bucket) {
  const int unit = layout_.buckets[static_cast<size_t>(bucket)].unit;
  return gradient_slot(slots_.gradient_slot[static_cast<size_t>(unit)]) +
         places_[static_cast<size_t>(bucket)].in_gradient_slot;
}

comm::SymmetricSpan Storage::gradient_source(int bucket) {
  return {
      .memory = gradients_.get(),
      .offset = static_cast<size_t>(gradient(bucket) - gradients_->local()),
      .bytes = static_cast<size_t>(layout_.buckets[static_cast<size_t>(bucket)].gradient_bytes())};
}

std::span<std::byte> Storage::slot(int slot) {
  return {slot_memory_ + slot_begin_[static_cast<size_t>(slot)],
          static_cast<size_t>(slots_.slot_bytes[static_cast<size_t>(slot)])};
}

bool Storage::contains(const void* address) const {
  if (inside(address, slot_memory_, slot_begin_.back())) return true;
  return !offloads() &&
         inside(address, shared() ? shared_shards_->data() : shards_->local(), shard_bytes_);
}

void Storage::store(int bucket, int64_t at, std::span<const float> values) {
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  const auto n = static_cast<int64_t>(values.size());
  check(at >= 0 && at + n <= info.shard_numel, "store outside of this rank's shard");
  std::byte* begin = shard(bucket) + at * static_cast<int64_t>(dtype_bytes(info.dtype));
  if (uint16_t* low = remainder(bucket)) {
    home_->write_split(values, reinterpret_cast<uint16_t*>(begin), low + at);
    return;
  }
  if (float* whole = master(bucket)) home_->write_floats(values, whole + at, DType::kF32);
  home_->write_floats(values, begin, info.dtype);
}

void Storage::load(int bucket, int64_t at, std::span<float> values) const {
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  const Place& place = places_[static_cast<size_t>(bucket)];
  const auto n = static_cast<int64_t>(values.size());
  check(at >= 0 && at + n <= info.shard_numel, "load outside of this rank's shard");
  const std::byte* begin = const_cast<Storage*>(this)->shard(bucket) +
                           at * static_cast<int64_t>(dtype_bytes(info.dtype));
  if (place.remainder) {
    home_->read_split(reinterpret_cast<const uint16_t*>(begin), place.remainder + at, values);
  } else if (place.master) {
    home_->read_floats(place.master + at, DType::kF32, values);
  } else {
    home_->read_floats(begin, info.dtype, values);
  }
}

}  // namespace fsdp::engine
