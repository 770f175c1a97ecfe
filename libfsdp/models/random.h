// Random numbers as pure functions of a key and a counter.
#pragma once

#include <cstdint>
#include <string_view>

namespace fsdp::models {

/// The finaliser of SplitMix64: a bijection whose output bits each depend on all input bits.
constexpr uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

/// 64 random bits for (key, counter).
constexpr uint64_t bits_at(uint64_t key, uint64_t counter) {
  return mix64(mix64(key + 0x9e3779b97f4a7c15ULL) + (counter + 1) * 0x9e3779b97f4a7c15ULL);
}

/// In [0, 1), multiples of 2^-53.
constexpr double uniform_at(uint64_t key, uint64_t counter) {
  return static_cast<double>(bits_at(key, counter) >> 11) * 0x1p-53;
}

/// A key for a named stream of numbers (FNV-1a).
constexpr uint64_t stream_key(uint64_t seed, std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (const char c : name) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3ULL;
  return mix64(hash ^ mix64(seed + 0x9e3779b97f4a7c15ULL));
}

}  // namespace fsdp::models
