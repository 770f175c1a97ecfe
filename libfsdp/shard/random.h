// Random numbers as pure functions of a key and a counter, and the scopes that say which key a
// random layer uses.
//
// Note [Random sites] A random call (a dropout) draws from a key that says where in training it is:
// seed, step, global micro-batch, then the path of calls that leads to it (number of the model's
// call in this micro-batch, number of the unit's call inside of that, number of the random call
// inside of the unit's). The path is counted in each scope alone, so entering a unit's call again
// with its site (activation checkpointing) draws the same numbers, nested units included; and no
// part of it depends on ranks, strategy or how the micro-batches are divided.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace fsdp {

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

/// Elements [begin, begin + out.size()) of an endless sequence of normal numbers. However the
/// sequence is cut, an element has the same bits.
void fill_normal(uint64_t key, int64_t begin, std::span<float> out, double mean, double deviation);

/// Likewise, uniform in [low, high).
void fill_uniform(uint64_t key, int64_t begin, std::span<float> out, double low, double high);

/// Likewise, normal numbers that lie in [low, high]. Cost: 1 / p draws an element, p being the
/// probability of that interval. Throws ConfigError when p is below 0.1%.
void fill_truncated_normal(uint64_t key, int64_t begin, std::span<float> out, double mean,
                           double deviation, double low, double high);

/// The thread's current place in training; see Note [Random sites].
///
/// Scopes nest like the calls that they stand for: each must end on its thread before the one that
/// it lies in.
class RandomScope {
 public:
  /// What a scope draws from: enough to draw the same numbers again, on any thread. None outside of
  /// a sharded model's step.
  using Site = std::optional<uint64_t>;

  class Root;
  class UnitCall;

  ~RandomScope();
  RandomScope(const RandomScope&) = delete;
  RandomScope& operator=(const RandomScope&) = delete;

  const Site& site() const { return site_; }
  /// That of the scope which the thread is in.
  static Site current_site();

  /// Key of the next random call in the current scope; from torch's default generator where there
  /// is none, so that torch::manual_seed reaches single modules.
  static uint64_t next_key();
  /// Whether random calls on this thread are keyed by their site.
  static bool active();

 protected:
  explicit RandomScope(const Site& site);

 private:
  static Site next_unit_call();

  Site site_;
  uint64_t next_ = 0;
  RandomScope* outer_;
};

/// Around a call of the whole model: its `call`-th (from 0) in global micro-batch `micro_batch` =
/// accumulation step * ranks + rank.
class RandomScope::Root : public RandomScope {
 public:
  Root(uint64_t seed, int64_t step, int64_t micro_batch, int64_t call);
};

/// Around a call of a unit, inside of the scope it is made in. Without one it changes nothing.
class RandomScope::UnitCall : public RandomScope {
 public:
  UnitCall() : RandomScope(next_unit_call()) {}
  /// The same call once more: for recomputation.
  explicit UnitCall(const Site& site) : RandomScope(site) {}
};

}  // namespace fsdp
