// Rows, batches and their two views.
#include "libfsdp/text/batch.h"

#include <gtest/gtest.h>

#include <numeric>
#include <random>
#include <sstream>
#include <vector>

#include "libfsdp/text/batch_view.h"
#include "tests/unit/text/fake_encoder.h"

namespace fsdp::text {
namespace {

Sample sample_of(const std::string& text, size_t learnt_from) {
  Sample sample;
  for (size_t i = 0; i < text.size(); ++i) {
    sample.input_ids.push_back(text[i]);
    sample.labels.push_back(i >= learnt_from && i > 0 ? text[i] : kIgnoredLabel);
  }
  return sample;
}

using Ids = std::vector<int32_t>;
constexpr int32_t kNo = kIgnoredLabel;

TEST(BatchTest, ShortRowsArePaddedOnTheRight) {
  const std::vector<Sample> samples = {sample_of("abc", 1), sample_of("de", 1)};
  const std::vector<Row> rows = {{0}, {1}};
  const Batch batch = make_batch(samples, rows, 7);
  EXPECT_EQ(batch.rows, 2);
  EXPECT_EQ(batch.cols, 3);
  EXPECT_EQ(batch.input_ids, (Ids{'a', 'b', 'c', 'd', 'e', 7}));
  EXPECT_EQ(batch.labels, (Ids{kNo, 'b', 'c', kNo, 'e', kNo}));
  EXPECT_EQ(batch.position_ids, (Ids{0, 1, 2, 0, 1, 0}));
  EXPECT_EQ(batch.documents, (std::vector<DocumentRange>{{0, 0, 3}, {1, 0, 2}}));
  EXPECT_EQ(batch.document_ends(), (Ids{3, 5, 6}));
  EXPECT_EQ(batch.tokens, 5);
  EXPECT_EQ(batch.trainable_tokens, 3);
}

TEST(BatchTest, PackedDocumentsRestartPositionsAndNeverPredictEachOther) {
  std::vector<Sample> samples = {sample_of("abc", 0), sample_of("de", 0), sample_of("fghij", 2)};
  samples[1].labels[0] = 'd';  // even where the sample says otherwise
  const std::vector<Row> rows = {{0, 1}, {2}};
  const Batch batch = make_batch(samples, rows, 0);
  EXPECT_EQ(batch.input_ids, (Ids{'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j'}));
  EXPECT_EQ(batch.labels, (Ids{kNo, 'b', 'c', kNo, 'e', kNo, kNo, 'h', 'i', 'j'}));
  EXPECT_EQ(batch.position_ids, (Ids{0, 1, 2, 0, 1, 0, 1, 2, 3, 4}));
  EXPECT_EQ(batch.document_ends(), (Ids{3, 5, 10}));
  EXPECT_EQ(batch.trainable_tokens, 6);
}

TEST(BatchTest, NoRowsGiveAnEmptyBatch) {
  const Batch batch = make_batch({}, {}, 0);
  EXPECT_EQ(batch.rows, 0);
  EXPECT_EQ(batch.tokens, 0);
  EXPECT_TRUE(batch.document_ends().empty());
}

TEST(PackingTest, EachSampleFillsTheFullestRowThatHasRoom) {
  const std::vector<int64_t> lengths = {3, 6, 4, 7, 1};
  // 7; 6+4; 3 into 7; 1 opens a row: both others are full.
  EXPECT_EQ(pack_rows(lengths, 10), (std::vector<Row>{{0, 3}, {1, 2}, {4}}));
  EXPECT_EQ(pack_rows(std::vector<int64_t>{5, 5, 5}, 5), (std::vector<Row>{{0}, {1}, {2}}));
  // 3 goes to the 7, which it fills, and not to the 6.
  EXPECT_EQ(pack_rows(std::vector<int64_t>{7, 6, 3}, 10), (std::vector<Row>{{0, 2}, {1}}));
  EXPECT_THROW(pack_rows(std::vector<int64_t>{6}, 5), InternalError);
}

TEST(PackingTest, NothingIsLostDoubledOrTooLong) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    const int64_t capacity = 1 + static_cast<int64_t>(random() % 64);
    std::vector<int64_t> lengths(random() % 100);
    for (auto& length : lengths)
      length = 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(capacity));
    const auto rows = pack_rows(lengths, capacity);
    std::vector<int> seen(lengths.size(), 0);

    for (const Row& row : rows) {
      int64_t total = 0;
      for (const int64_t i : row) {
        total += lengths[static_cast<size_t>(i)];
        ++seen[static_cast<size_t>(i)];
      }
      EXPECT_LE(total, capacity);
      EXPECT_TRUE(std::is_sorted(row.begin(), row.end()));
    }
    EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
    // Any two rows hold more than one capacity together, so rows are at most twice the least
    // number, and one. total over the capacity.
    const int64_t total = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    const int64_t least = (total + capacity - 1) / capacity;
    EXPECT_LE(static_cast<int64_t>(rows.size()), least * 2 + 1);
  }
}

TEST(BatchViewTest, WhatIsLearntIsMarked) {
  const FakeEncoder encoder;
  const std::vector<Sample> samples = {sample_of("user:yes", 5), sample_of("x", 1)};
  const std::vector<Row> rows = {{0, 1}};
  const Batch batch = make_batch(samples, rows, 0);
  EXPECT_EQ(show_batch(batch, encoder, false),
            "--- row 0, columns 0 to 7: 8 tokens, 3 trained on\nuser:[[yes]]\n"
            "--- row 0, columns 8 to 8: 1 tokens, 0 trained on\nx\n");
  EXPECT_NE(show_batch(batch, encoder, true).find("\x1b[2muser:\x1b[0m\x1b[1;32myes\x1b[0m"),
            std::string::npos);
}

TEST(BatchViewTest, EverySequenceIsAJsonLine) {
  const std::vector<Sample> samples = {sample_of("ab", 1), sample_of("c", 1), sample_of("d", 1)};
  const std::vector<Row> rows = {{0, 2}, {1}};
  std::ostringstream out;
  write_sequences(out, samples, rows);
  EXPECT_EQ(
      out.str(),
      "{\"input_ids\": [97, 98, 100], \"labels\": [-100, 98, -100], \"position_ids\": [0, 1, 0]}\n"
      "{\"input_ids\": [99], \"labels\": [-100], \"position_ids\": [0]}\n");
}

}  // namespace
}  // namespace fsdp::text
