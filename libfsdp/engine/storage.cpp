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
  if (has_remainder(bucket, precision)) return bucket.shard_numel * int64_t{sizeof(uint16_t)};
  return has_master(bucket, precision) ? bucket.shard_numel * int64_t{sizeof(float)} : 0;
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
      compute_(&comm.compute()) {
  place_buckets();
  allocate(comm, precision);
}

void Storage::place_buckets() {
  for (const std::vector<int>& buckets : layout_.of_unit) {
    int64_t in_slot = 0;
    int64_t in_gradient_slot = 0;
    for (const int b : buckets) {
      const plan::Bucket& bucket = layout_.buckets[static_cast<size_t>(b)];
      Place& place = places_[static_cast<size_t>(b)];
      place.shard_offset = shard_bytes_;
      shard_bytes_ += shared() ? bucket.padded_bytes() : bucket.shard_bytes();
      place.in_slot = in_slot;
      in_slot += bucket.padded_bytes();
      place.in_gradient_slot = in_gradient_slot;
      if (bucket.trainable) in_gradient_slot += bucket.gradient_bytes();
    }
  }
}

void Storage::allocate_shards(comm::Communicator& comm) {
  const auto bytes = static_cast<size_t>(shard_bytes_);
  if (shared()) {
    shared_shards_ = comm.allocate_shared(placement_.mesh.shard_group(comm.rank()), bytes,
                                          "parameters of a shard group");
  } else {
    shards_ = comm.allocate(bytes, "parameter shards");
  }
}

bool Storage::sums_in_slot(int bucket) const {
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  if (placement_.mesh.replicate > 1 || info.reduce_dtype != DType::kF32) return false;
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
  sums_memory_ = compute_->allocate(static_cast<size_t>(bytes), "gradient shards of the root");
  allocated_bytes_ += bytes;
  Pages pages(sums_memory_.get(), bytes);
  for (const int b : layout_.of_unit[kRoot]) {
    const plan::Bucket& bucket = layout_.buckets[static_cast<size_t>(b)];
    if (!needs_memory(b)) continue;
    places_[static_cast<size_t>(b)].gradient = {
        reinterpret_cast<float*>(pages.take(page_bytes<float>(bucket))),
        static_cast<size_t>(bucket.shard_numel)};
  }
}

void Storage::allocate(comm::Communicator& comm, MasterPrecision precision) {
  int64_t local = slot_begin_.back();
  for (size_t b = 0; b < layout_.buckets.size(); ++b) {
    const plan::Bucket& bucket = layout_.buckets[b];
    if (bucket.trainable && !sums_in_slot(static_cast<int>(b))) local += page_bytes<float>(bucket);
    if (has_remainder(bucket, precision)) local += page_bytes<uint16_t>(bucket);
    if (has_master(bucket, precision)) local += page_bytes<float>(bucket);
  }
  allocate_shards(comm);
  gradients_ = comm.allocate(static_cast<size_t>(gradient_begin_.back()), "gradient slots");
  if (compute_ != &kernels::host_compute()) {  // Transports of devices know their own memory best.
    slots_memory_ = comm.allocate(static_cast<size_t>(slot_begin_.back()), "slots");
    local -= slot_begin_.back();
  }
  memory_ = compute_->allocate(static_cast<size_t>(local), "slots and masters");
  Pages pages(memory_.get(), local);
  slot_memory_ = slots_memory_ ? slots_memory_->local() : pages.take(slot_begin_.back());
  for (size_t b = 0; b < places_.size(); ++b) {
    const plan::Bucket& bucket = layout_.buckets[b];
    const auto floats = [&] {
      return reinterpret_cast<float*>(pages.take(page_bytes<float>(bucket)));
    };
    if (bucket.trainable && !sums_in_slot(static_cast<int>(b)))
      places_[b].gradient = {floats(), static_cast<size_t>(bucket.shard_numel)};
    if (has_master(bucket, precision)) places_[b].master = floats();
    if (has_remainder(bucket, precision))
      places_[b].remainder = reinterpret_cast<uint16_t*>(pages.take(page_bytes<uint16_t>(bucket)));
  }
  allocated_bytes_ = shard_bytes_ / (shared() ? placement_.mesh.shard : 1) +
                     gradient_begin_.back() + local + (slots_memory_ ? slot_begin_.back() : 0);
}

std::byte* Storage::shard(int bucket) {
  const int64_t offset = places_[static_cast<size_t>(bucket)].shard_offset;
  if (!shared()) return shards_->local() + offset;
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  return shared_shards_->data() + offset + coordinate_ * info.shard_bytes();
}

comm::SymmetricSpan Storage::shard_source(int bucket) {
  return {.memory = shards_.get(),
          .offset = static_cast<size_t>(places_[static_cast<size_t>(bucket)].shard_offset),
          .bytes = static_cast<size_t>(layout_.buckets[static_cast<size_t>(bucket)].shard_bytes())};
}

std::span<float> Storage::gradient_shard(int bucket) {
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  if (!info.trainable || !sums_in_slot(bucket))
    return places_[static_cast<size_t>(bucket)].gradient;
  auto* const whole = reinterpret_cast<float*>(gradient(bucket));
  return {whole + coordinate_ * info.shard_numel, static_cast<size_t>(info.shard_numel)};
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
  return inside(address, slot_memory_, slot_begin_.back()) ||
         inside(address, shared() ? shared_shards_->data() : shards_->local(), shard_bytes_);
}

void Storage::store(int bucket, int64_t at, std::span<const float> values) {
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  const auto n = static_cast<int64_t>(values.size());
  check(at >= 0 && at + n <= info.shard_numel, "store outside of this rank's shard");
  std::byte* begin = shard(bucket) + at * static_cast<int64_t>(dtype_bytes(info.dtype));
  if (uint16_t* low = remainder(bucket)) {
    compute_->write_split(values, reinterpret_cast<uint16_t*>(begin), low + at);
    return;
  }
  if (float* whole = master(bucket)) compute_->write_floats(values, whole + at, DType::kF32);
  compute_->write_floats(values, begin, info.dtype);
}

void Storage::load(int bucket, int64_t at, std::span<float> values) const {
  const plan::Bucket& info = layout_.buckets[static_cast<size_t>(bucket)];
  const Place& place = places_[static_cast<size_t>(bucket)];
  const auto n = static_cast<int64_t>(values.size());
  check(at >= 0 && at + n <= info.shard_numel, "load outside of this rank's shard");
  const std::byte* begin = const_cast<Storage*>(this)->shard(bucket) +
                           at * static_cast<int64_t>(dtype_bytes(info.dtype));
  if (place.remainder) {
    compute_->read_split(reinterpret_cast<const uint16_t*>(begin), place.remainder + at, values);
  } else if (place.master) {
    compute_->read_floats(place.master + at, DType::kF32, values);
  } else {
    compute_->read_floats(begin, info.dtype, values);
  }
}

}  // namespace fsdp::engine
