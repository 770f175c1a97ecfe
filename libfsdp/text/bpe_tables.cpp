// The two hash tables of Bpe: open addressing with linear probing, at most half full.
#include <algorithm>
#include <functional>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/text/bpe.h"

namespace fsdp::text {
namespace {

constexpr size_t kFirstSlots = 1024;

// Finalizer of MurmurHash3: spreads keys that differ in few bits.
uint64_t mix(uint64_t key) {
  key ^= key >> 33;
  key *= 0xff51afd7ed558ccdULL;
  key ^= key >> 33;
  key *= 0xc4ceb9fe1a85ec53ULL;
  return key ^ key >> 33;
}

size_t hash_of(std::string_view text) { return std::hash<std::string_view>{}(text); }

uint64_t pair_key(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

}  // namespace

size_t StringTable::slot_of(std::string_view text, size_t hash) const {
  const size_t mask = slots_.size() - 1;
  size_t slot = hash & mask;
  for (; slots_[slot].id >= 0; slot = (slot + 1) & mask) {
    if (slots_[slot].hash != static_cast<uint32_t>(hash >> 32)) continue;
    if (view(spans_[static_cast<size_t>(slots_[slot].id)]) == text) break;
  }
  return slot;
}

void StringTable::grow() {
  const std::vector<Slot> old =
      std::exchange(slots_, std::vector<Slot>(std::max(kFirstSlots, slots_.size() * 2)));
  for (const Slot& slot : old) {
    if (slot.id < 0) continue;
    const std::string_view text = view(spans_[static_cast<size_t>(slot.id)]);
    slots_[slot_of(text, hash_of(text))] = slot;
  }
}

bool StringTable::insert(std::string_view text, int32_t id) {
  check(id >= 0 && id < kMaxTokenIds, "token id out of range");
  if (slots_.size() < 2 * (count_ + 1)) grow();
  const size_t hash = hash_of(text);
  Slot& slot = slots_[slot_of(text, hash)];
  const auto index = static_cast<size_t>(id);
  if (slot.id >= 0 || (index < spans_.size() && spans_[index].begin != kAbsent)) return false;
  if (index >= spans_.size()) spans_.resize(index + 1);
  spans_[index] = {bytes_.size(), static_cast<uint32_t>(text.size())};
  bytes_ += text;
  slot = {static_cast<uint32_t>(hash >> 32), id};
  ++count_;
  return true;
}

int32_t StringTable::find(std::string_view text) const {
  return slots_.empty() ? -1 : slots_[slot_of(text, hash_of(text))].id;
}

std::optional<std::string_view> StringTable::text_of(int32_t id) const {
  if (id < 0 || id >= id_limit() || spans_[static_cast<size_t>(id)].begin == kAbsent)
    return std::nullopt;
  return view(spans_[static_cast<size_t>(id)]);
}

size_t MergeTable::slot_of(uint64_t key) const {
  const size_t mask = slots_.size() - 1;
  size_t slot = mix(key) & mask;
  while (slots_[slot].key != kFree && slots_[slot].key != key) slot = (slot + 1) & mask;
  return slot;
}

void MergeTable::grow() {
  const std::vector<Slot> old =
      std::exchange(slots_, std::vector<Slot>(std::max(kFirstSlots, slots_.size() * 2)));
  for (const Slot& slot : old) {
    if (slot.key != kFree) slots_[slot_of(slot.key)] = slot;
  }
}

void MergeTable::set(int32_t left, int32_t right, Merge merge) {
  if (slots_.size() < 2 * (count_ + 1)) grow();
  Slot& slot = slots_[slot_of(pair_key(left, right))];
  if (slot.key == kFree) ++count_;
  slot = {pair_key(left, right), merge};
}

const Merge* MergeTable::find(int32_t left, int32_t right) const {
  if (slots_.empty()) return nullptr;
  const Slot& slot = slots_[slot_of(pair_key(left, right))];
  return slot.key == kFree ? nullptr : &slot.merge;
}

}  // namespace fsdp::text
