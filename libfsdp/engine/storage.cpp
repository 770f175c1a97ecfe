#include "libfsdp/engine/storage.h"

#include <algorithm>
#include <cstring>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"
#include "libfsdp/kernels/split_master.h"

namespace fsdp::engine {
namespace {

constexpr int64_t kPage = 4096;

bool has_split_master(const plan::Bucket& bucket) {
  return bucket.trainable && bucket.dtype == DType::kBF16;
}

bool inside(const void* address, const std::byte* begin, int64_t bytes) {
  const auto* at = static_cast<const std::byte*>(address);
  return bytes > 0 && at >= begin && at < begin + bytes;
}

}  // namespace

Storage::Storage(const plan::Layout& layout, const plan::Placement& placement,
                 comm::Communicator& comm)
    : layout_(layout), placement_(placement), places_(layout.buckets.size()) {
  place_buckets();
  allocate(comm);
}

void Storage::place_buckets() {
  for (size_t unit = 0; unit < layout_.units.size(); ++unit) {
    int64_t in_slot = 0;
    int64_t in_gradient_slot = 0;
    for (const int b : layout_.of_unit[unit]) {
      const plan::Bucket& bucket = layout_.buckets[static_cast<size_t>(b)];
      Place& place = places_[static_cast<size_t>(b)];
      place.shard_offset = shard_bytes_;
      shard_bytes_ += bucket.shard_bytes();
      place.in_slot = in_slot;
      in_slot += bucket.padded_bytes();
      place.in_gradient_slot = in_gradient_slot;
      if (bucket.trainable) in_gradient_slot += bucket.padded_bytes();
    }
    int64_t& slot = unit == 0 ? root_slot_bytes_ : slot_bytes_;
    int64_t& gradient_slot = unit == 0 ? root_gradient_bytes_ : gradient_slot_bytes_;
    slot = std::max(slot, round_up(in_slot, kPage));
    gradient_slot = std::max(gradient_slot, round_up(in_gradient_slot, kPage));
  }
  if (placement_.home == plan::Home::kResident) slot_bytes_ = root_slot_bytes_ = 0;
}

void Storage::allocate(comm::Communicator& comm) {
  const int64_t slots = placement_.slots * slot_bytes_ + root_slot_bytes_;
  const int64_t gradients = placement_.gradient_slots * gradient_slot_bytes_ + root_gradient_bytes_;
  int64_t local = slots;
  for (const plan::Bucket& bucket : layout_.buckets) {
    if (bucket.trainable) local += round_up(bucket.shard_numel * int64_t{sizeof(float)}, kPage);
    if (has_split_master(bucket))
      local += round_up(bucket.shard_numel * int64_t{sizeof(uint16_t)}, kPage);
  }
  shards_ = comm.allocate(static_cast<size_t>(shard_bytes_), "parameter shards");
  gradients_ = comm.allocate(static_cast<size_t>(gradients), "gradient slots");
  arena_ = std::make_unique<device::HostArena>(static_cast<size_t>(local));
  slots_ = arena_->allocate(static_cast<size_t>(slots), kPage);
  for (size_t b = 0; b < places_.size(); ++b) {
    const plan::Bucket& bucket = layout_.buckets[b];
    const auto numel = static_cast<size_t>(bucket.shard_numel);
    if (bucket.trainable) {
      auto* data = reinterpret_cast<float*>(arena_->allocate(numel * sizeof(float), kPage));
      places_[b].gradient = {data, numel};
    }
    if (has_split_master(bucket)) {
      places_[b].remainder =
          reinterpret_cast<uint16_t*>(arena_->allocate(numel * sizeof(uint16_t), kPage));
    }
  }
  allocated_bytes_ = shard_bytes_ + gradients + local;
}

std::byte* Storage::shard(int bucket) {
  return shards_->local() + places_[static_cast<size_t>(bucket)].shard_offset;
}

comm::SymmetricSpan Storage::shard_source(int bucket) {
  return {.memory = shards_.get(),
          .offset = static_cast<size_t>(places_[static_cast<size_t>(bucket)].shard_offset),
          .bytes = static_cast<size_t>(layout_.buckets[static_cast<size_t>(bucket)].shard_bytes())};
}

uint16_t* Storage::remainder(int bucket) { return places_[static_cast<size_t>(bucket)].remainder; }

std::span<float> Storage::gradient_shard(int bucket) {
  return places_[static_cast<size_t>(bucket)].gradient;
}

std::byte* Storage::gathered(int slot, int bucket) {
  if (slot < 0) return shard(bucket);
  return this->slot(slot).data() + places_[static_cast<size_t>(bucket)].in_slot;
}

std::byte* Storage::gradient(int gradient_slot, int bucket) {
  return gradients_->local() + gradient_slot * gradient_slot_bytes_ +
         places_[static_cast<size_t>(bucket)].in_gradient_slot;
}

comm::SymmetricSpan Storage::gradient_source(int gradient_slot, int bucket) {
  return {
      .memory = gradients_.get(),
      .offset = static_cast<size_t>(gradient(gradient_slot, bucket) - gradients_->local()),
      .bytes = static_cast<size_t>(layout_.buckets[static_cast<size_t>(bucket)].padded_bytes())};
}

std::span<std::byte> Storage::slot(int slot) {
  const int64_t bytes = slot == placement_.slots ? root_slot_bytes_ : slot_bytes_;
  return {slots_ + slot * slot_bytes_, static_cast<size_t>(bytes)};
}

bool Storage::contains(const void* address) const {
  const int64_t slots = placement_.slots * slot_bytes_ + root_slot_bytes_;
  return inside(address, slots_, slots) || inside(address, shards_->local(), shard_bytes_);
}

void Storage::store(int bucket, int64_t at, std::span<const float> values) {
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  const auto n = static_cast<int64_t>(values.size());
  check(at >= 0 && at + n <= info.shard_numel, "store outside of this rank's shard");
  std::byte* begin = shard(bucket) + at * static_cast<int64_t>(dtype_bytes(info.dtype));
  if (uint16_t* low = remainder(bucket)) {
    kernels::split_master_cpu(values.data(), reinterpret_cast<uint16_t*>(begin), low + at, n);
  } else {
    convert_floats(values.data(), DType::kF32, begin, info.dtype, values.size());
  }
}

void Storage::load(int bucket, int64_t at, std::span<float> values) const {
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  const Place& place = places_[static_cast<size_t>(bucket)];
  const auto n = static_cast<int64_t>(values.size());
  check(at >= 0 && at + n <= info.shard_numel, "load outside of this rank's shard");
  const std::byte* begin =
      shards_->local() + place.shard_offset + at * static_cast<int64_t>(dtype_bytes(info.dtype));
  if (place.remainder) {
    kernels::join_master_cpu(reinterpret_cast<const uint16_t*>(begin), place.remainder + at,
                             values.data(), n);
  } else {
    convert_floats(begin, info.dtype, values.data(), DType::kF32, values.size());
  }
}

}  // namespace fsdp::engine
