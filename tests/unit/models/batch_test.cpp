#include "libfsdp/models/batch.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "libfsdp/base/error.h"

namespace fsdp::models {
namespace {

std::vector<int64_t> numbers(const at::Tensor& t) {
  return {t.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>() + t.numel()};
}
using Numbers = std::vector<int64_t>;

TEST(MakeBatchTest, LeavesPaddingOutAndShiftsLabelsWithinDocuments) {
  const Numbers ids{10, 11, 12, 13, 14, 0, 20, 21, 0, 0, 0, 0};
  const Numbers labels{10, 11, -100, 13, 14, -100, -100, 21, -100, -100, -100, -100};
  const std::vector<DocumentSpan> documents{{0, 0, 3}, {0, 3, 5}, {1, 0, 2}};
  const CausalLmBatch batch = make_batch(2, 6, ids, labels, {}, documents);
  EXPECT_EQ(numbers(batch.input_ids), Numbers({10, 11, 12, 13, 14, 20, 21}));
  EXPECT_EQ(numbers(batch.position_ids), Numbers({0, 1, 2, 0, 1, 0, 1}));
  EXPECT_EQ(numbers(batch.loss_rows), Numbers({0, 3, 5}));  // not 2 -> 3: another document
  EXPECT_EQ(numbers(batch.loss_targets), Numbers({11, 14, 21}));
  EXPECT_EQ(batch.trainable_tokens(), 3);
  ASSERT_EQ(batch.spans->spans.size(), 3u);
  EXPECT_EQ(batch.spans->spans[2].begin, 5);
  EXPECT_EQ(batch.spans->tokens(), 7);
}

TEST(MakeBatchTest, TakesPositionsAsGiven) {
  const Numbers ids{1, 2}, positions{7, 8};
  const std::vector<DocumentSpan> documents{{0, 0, 2}};
  EXPECT_EQ(numbers(make_batch(1, 2, ids, ids, positions, documents).position_ids), positions);
}

TEST(MakeBatchTest, RefusesDocumentsThatOverlapOrLeaveTheRow) {
  const Numbers ids{1, 2, 3, 4};
  const auto make = [&](std::vector<DocumentSpan> documents) {
    return make_batch(2, 2, ids, ids, {}, documents);
  };
  EXPECT_NO_THROW(make({{0, 0, 1}, {0, 1, 2}, {1, 0, 2}}));
  EXPECT_THROW(make({{0, 0, 2}, {0, 1, 2}}), DataError);
  EXPECT_THROW(make({{1, 0, 1}, {0, 0, 1}}), DataError);
  EXPECT_THROW(make({{0, 0, 3}}), DataError);
  EXPECT_THROW(make({{0, 1, 1}}), DataError);
  EXPECT_THROW(make({{2, 0, 1}}), DataError);
  EXPECT_THROW(make_batch(2, 3, ids, ids, {}, {}), DataError);
}

}  // namespace
}  // namespace fsdp::models
