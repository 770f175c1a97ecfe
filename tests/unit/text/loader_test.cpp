#include "libfsdp/text/loader.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <vector>

namespace fsdp::text {
namespace {

/// Sample i: i % 7 + 1 tokens, all of them i.
std::vector<Sample> numbered_samples(int64_t n) {
  std::vector<Sample> samples;
  for (int64_t i = 0; i < n; ++i) {
    const std::vector<int32_t> ids(static_cast<size_t>(i % 7 + 1), static_cast<int32_t>(i));
    samples.push_back({ids, ids});
  }
  return samples;
}

/// Samples in a batch, in order.
std::vector<int32_t> samples_in(const Batch& batch) {
  std::vector<int32_t> out;
  for (const auto& document : batch.documents) {
    out.push_back(batch.input_ids[static_cast<size_t>(document.row * batch.cols + document.begin)]);
  }
  return out;
}

TEST(LoaderTest, TheOrderIsAFunctionOfSeedAndEpochAlone) {
  EXPECT_EQ(shuffled_order(50, 3, 1), shuffled_order(50, 3, 1));
  EXPECT_NE(shuffled_order(50, 3, 1), shuffled_order(50, 3, 2));
  EXPECT_NE(shuffled_order(50, 3, 1), shuffled_order(50, 4, 1));
  EXPECT_TRUE(shuffled_order(0, 1, 1).empty());
  // Fixed for all time and machines: another order would change resumed runs.
  EXPECT_EQ(shuffled_order(10, 42, 0), (std::vector<int64_t>{3, 6, 4, 0, 8, 7, 1, 9, 2, 5}));
}

TEST(LoaderTest, EveryPermutationComesAboutEquallyOften) {
  std::map<std::vector<int64_t>, int> counts;
  constexpr int kRounds = 24000;
  for (int epoch = 0; epoch < kRounds; ++epoch) ++counts[shuffled_order(4, 7, epoch)];
  ASSERT_EQ(counts.size(), 24U);
  for (const auto& [order, count] : counts)
    EXPECT_NEAR(count, 1000, 5 * 31) << "five standard deviations";
}

TEST(LoaderTest, EverySampleComesOnceInAnEpochAtAnyNumberOfRanks) {
  for (const bool packing : {false, true}) {
    const auto samples = numbered_samples(53);
    const Loader loader(
        samples, {.rows_per_micro_batch = 2, .packing = packing, .max_seq_length = 12, .seed = 5});
    const auto order = loader.order(2);
    std::vector<int32_t> first_sequence;
    for (const auto& [world, accumulation] :
         {std::pair{1, 1}, {1, 12}, {2, 6}, {3, 4}, {4, 3}, {5, 2}, {64, 1}}) {
      std::vector<int32_t> sequence;
      for (int64_t step = 0; step < loader.steps_per_epoch(world, accumulation); ++step) {
        for (int64_t a = 0; a < accumulation; ++a) {
          for (int64_t rank = 0; rank < world; ++rank) {
            const LoaderPlace place{step, a, accumulation, rank, world};
            const auto batch = loader.micro_batch(order, place.micro_batch());
            if (!batch) continue;
            const auto here = samples_in(*batch);
            sequence.insert(sequence.end(), here.begin(), here.end());
          }
        }
      }
      if (first_sequence.empty()) first_sequence = sequence;
      EXPECT_EQ(sequence, first_sequence) << world << " ranks";
      EXPECT_EQ(std::set<int32_t>(sequence.begin(), sequence.end()).size(), samples.size());
      EXPECT_EQ(sequence.size(), samples.size());
    }
  }
}

TEST(LoaderTest, PackedRowsHoldAllTokensAndNoRowIsTooLong) {
  const auto samples = numbered_samples(40);
  const Loader loader(samples, {.packing = true, .max_seq_length = 10});
  int64_t tokens = 0, expected = 0;
  for (int64_t m = 0; m < loader.micro_batches_per_epoch(); ++m) {
    const auto batch = loader.micro_batch(loader.order(0), m);
    EXPECT_LE(batch->cols, 10);
    tokens += batch->tokens;
  }
  for (const auto& sample : samples) expected += sample.tokens();
  EXPECT_EQ(tokens, expected);
  EXPECT_LT(loader.micro_batches_per_epoch(), 40);
}

TEST(LoaderTest, TheLastMicroBatchMayBeSmallerAndNothingLiesBehindIt) {
  const auto samples = numbered_samples(7);
  const Loader loader(samples, {.rows_per_micro_batch = 3, .shuffle = false});
  EXPECT_EQ(loader.micro_batches_per_epoch(), 3);
  EXPECT_EQ(loader.steps_per_epoch(2, 1), 2);
  EXPECT_EQ(loader.steps_per_epoch(2, 2), 1);
  const auto order = loader.order(0);
  EXPECT_EQ(samples_in(*loader.micro_batch(order, 0)), (std::vector<int32_t>{0, 1, 2}));
  EXPECT_EQ(samples_in(*loader.micro_batch(order, 2)), (std::vector<int32_t>{6}));
  EXPECT_FALSE(loader.micro_batch(order, 3).has_value());
  EXPECT_EQ(loader.order(0), loader.order(1)) << "without shuffle";
}

TEST(LoaderTest, AnEmptyMicroBatchSizeIsRefused) {
  EXPECT_THROW(Loader({}, {.rows_per_micro_batch = 0}), ConfigError);
}

}  // namespace
}  // namespace fsdp::text
