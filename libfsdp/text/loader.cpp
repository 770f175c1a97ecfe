#include "libfsdp/text/loader.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "libfsdp/base/checked.h"

namespace fsdp::text {
namespace {

uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

/// floor(u * n / 2^64): uniform in [0, n) up to n / 2^64.
uint64_t scale_down(uint64_t u, uint64_t n) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>((static_cast<Wide>(u) * n) >> 64);
}

std::vector<Row> make_rows(std::span<const Sample> samples, const LoaderOptions& options) {
  if (!options.packing) return single_rows(static_cast<int64_t>(samples.size()));
  std::vector<int64_t> lengths;
  for (const Sample& sample : samples) lengths.push_back(sample.tokens());
  return pack_rows(lengths, options.max_seq_length);
}

}  // namespace

std::vector<int64_t> shuffled_order(int64_t n, uint64_t seed, int64_t epoch) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  const uint64_t key = splitmix64(splitmix64(seed) + static_cast<uint64_t>(epoch));
  for (uint64_t i = order.size(); i-- > 1;)
    std::swap(order[i], order[scale_down(splitmix64(key + i), i + 1)]);
  return order;
}

Loader::Loader(std::span<const Sample> samples, const LoaderOptions& options)
    : samples_(samples), options_(options) {
  if (options.rows_per_micro_batch < 1) {
    throw ConfigError(cat("the batch size must be at least 1, got ", options.rows_per_micro_batch));
  }
  rows_ = make_rows(samples, options);
}

int64_t Loader::micro_batches_per_epoch() const {
  const auto rows = static_cast<int64_t>(rows_.size());
  return rows / options_.rows_per_micro_batch + (rows % options_.rows_per_micro_batch != 0 ? 1 : 0);
}

int64_t Loader::steps_per_epoch(int64_t world, int64_t accumulation_steps) const {
  const int64_t per_step = checked_mul(world, accumulation_steps, "micro-batches of a step");
  return round_up(micro_batches_per_epoch(), per_step) / per_step;
}

std::vector<int64_t> Loader::order(int64_t epoch) const {
  const auto rows = static_cast<int64_t>(rows_.size());
  if (options_.shuffle) return shuffled_order(rows, options_.seed, epoch);
  std::vector<int64_t> order(rows_.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  return order;
}

std::optional<Batch> Loader::micro_batch(std::span<const int64_t> order, int64_t number) const {
  check(order.size() == rows_.size(), "an order of another data set");
  if (number < 0 || number >= micro_batches_per_epoch()) return std::nullopt;
  const auto begin = static_cast<size_t>(number * options_.rows_per_micro_batch);
  const size_t end =
      std::min(rows_.size(), begin + static_cast<size_t>(options_.rows_per_micro_batch));
  std::vector<Row> rows;
  for (size_t i = begin; i < end; ++i) rows.push_back(rows_[static_cast<size_t>(order[i])]);
  return make_batch(samples_, rows, options_.pad_id);
}

}  // namespace fsdp::text
