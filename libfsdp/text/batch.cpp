#include "libfsdp/text/batch.h"

#include <algorithm>

#include "libfsdp/base/checked.h"

namespace fsdp::text {
namespace {

int64_t row_tokens(std::span<const Sample> samples, const Row& row) {
  int64_t total = 0;
  for (const int64_t i : row) total += samples[static_cast<size_t>(i)].tokens();
  return total;
}

void place(Batch& batch, const Sample& sample, int64_t row, int64_t begin) {
  const auto at = static_cast<size_t>(row * batch.cols + begin);
  for (size_t i = 0; i < sample.input_ids.size(); ++i) {
    batch.input_ids[at + i] = sample.input_ids[i];
    batch.labels[at + i] = i == 0 ? kIgnoredLabel : sample.labels[i];
    batch.position_ids[at + i] = static_cast<int32_t>(i);
    batch.trainable_tokens += batch.labels[at + i] != kIgnoredLabel ? 1 : 0;
  }
  batch.tokens += sample.tokens();
  batch.documents.push_back({row, begin, begin + sample.tokens()});
}

}  // namespace

std::vector<int32_t> Batch::document_ends() const {
  std::vector<int32_t> ends;
  size_t next = 0;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t end = 0;
    for (; next < documents.size() && documents[next].row == row; ++next) {
      end = documents[next].end;
      ends.push_back(static_cast<int32_t>(row * cols + end));
    }
    if (end < cols) ends.push_back(static_cast<int32_t>((row + 1) * cols));
  }
  return ends;
}

Batch make_batch(std::span<const Sample> samples, std::span<const Row> rows, int32_t pad_id) {
  Batch batch{.rows = static_cast<int64_t>(rows.size())};
  for (const Row& row : rows) batch.cols = std::max(batch.cols, row_tokens(samples, row));
  const int64_t size = checked_mul(batch.rows, batch.cols, "tokens of a batch");
  check(size < (int64_t{1} << 31), "a batch has 2^31 tokens or more");
  batch.input_ids.assign(static_cast<size_t>(size), pad_id);
  batch.labels.assign(static_cast<size_t>(size), kIgnoredLabel);
  batch.position_ids.assign(static_cast<size_t>(size), 0);
  for (int64_t r = 0; r < batch.rows; ++r) {
    int64_t begin = 0;
    for (const int64_t i : rows[static_cast<size_t>(r)]) {
      const Sample& sample = samples[static_cast<size_t>(i)];
      place(batch, sample, r, begin);
      begin += sample.tokens();
    }
  }
  return batch;
}

}  // namespace fsdp::text
