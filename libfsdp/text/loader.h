// The order of training data: which rows make up which micro-batch of which epoch.
//
// The global sequence of micro-batches depends on the data, the seed, the epoch and the rows in a
// micro-batch alone, not on the number of ranks: with W ranks and A accumulation steps, optimizer
// step s takes micro-batches [s * A * W, (s + 1) * A * W) of the epoch, and rank r computes number
// (s * A + a) * W + r in accumulation step a. At the end of an epoch the last micro-batch may have
// fewer rows, and ranks whose numbers lie behind it have nothing to compute.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "libfsdp/text/batch.h"

namespace fsdp::text {

/// A permutation of 0 .. n-1 that is a function of (n, seed, epoch) on every machine.
///
/// Fisher-Yates from the back: for i = n-1 ... 1, swap places i and j, where j = floor(u * (i + 1)
/// / 2^64) and u = splitmix64(splitmix64(splitmix64(seed) + epoch) + i). Cost: O(n).
std::vector<int64_t> shuffled_order(int64_t n, uint64_t seed, int64_t epoch);

struct LoaderOptions {
  int64_t rows_per_micro_batch = 1;
  bool packing = false;
  int64_t max_seq_length = 1024;  ///< room in a packed row
  bool shuffle = true;            ///< false: the same order in every epoch
  uint64_t seed = 0;
  int32_t pad_id = 0;
};

/// Where rank `rank` of `world` stands in accumulation step `accumulation_step` of optimizer step
/// `step` of an epoch.
struct LoaderPlace {
  int64_t step = 0;
  int64_t accumulation_step = 0;
  int64_t accumulation_steps = 1;
  int64_t rank = 0;
  int64_t world = 1;

  int64_t micro_batch() const {
    return (step * accumulation_steps + accumulation_step) * world + rank;
  }
};

/// Micro-batches by number. Resuming at (epoch, number) costs one shuffle. Const functions may be
/// called from several threads at once.
class Loader {
 public:
  /// `samples` must outlive the loader. Throws ConfigError for rows_per_micro_batch below 1.
  Loader(std::span<const Sample> samples, const LoaderOptions& options);

  /// All rows of the set, in the order of the file: packed, or one sample each.
  const std::vector<Row>& rows() const { return rows_; }
  int64_t micro_batches_per_epoch() const;
  /// Optimizer steps of an epoch, the last of which may be partial.
  int64_t steps_per_epoch(int64_t world, int64_t accumulation_steps) const;

  /// The order of rows in `epoch`; keep it while the epoch lasts.
  std::vector<int64_t> order(int64_t epoch) const;

  /// Micro-batch `number` under `order`; nothing when the epoch has fewer.
  std::optional<Batch> micro_batch(std::span<const int64_t> order, int64_t number) const;

 private:
  std::span<const Sample> samples_;
  LoaderOptions options_;
  std::vector<Row> rows_;
};

}  // namespace fsdp::text
