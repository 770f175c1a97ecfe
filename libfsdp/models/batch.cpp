#include "libfsdp/models/batch.h"

#include <ATen/ops/empty.h>

#include "libfsdp/base/error.h"

namespace fsdp::models {
namespace {

constexpr int64_t kIgnoredLabel = -100;

at::Tensor as_tensor(const std::vector<int64_t>& values) {
  at::Tensor tensor = at::empty({static_cast<int64_t>(values.size())}, at::kLong);
  std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<int64_t>());
  return tensor;
}

void check_sizes(int64_t rows, int64_t length, size_t ids, size_t labels, size_t positions) {
  const auto expected = static_cast<size_t>(rows * length);
  if (rows < 0 || length < 0 || ids != expected || labels != expected ||
      (positions != 0 && positions != expected)) {
    throw DataError(cat("batch: ", ids, " input_ids, ", labels, " labels, ", positions,
                        " position_ids for ", rows, " x ", length, " tokens"));
  }
}

void check_documents(int64_t rows, int64_t length, std::span<const DocumentSpan> documents) {
  DocumentSpan last{0, 0, 0};
  for (const DocumentSpan& d : documents) {
    const bool in_range =
        d.row >= 0 && d.row < rows && d.begin >= 0 && d.begin < d.end && d.end <= length;
    const bool in_order = d.row > last.row || (d.row == last.row && d.begin >= last.end);
    if (!in_range || !in_order) {
      throw DataError(cat("batch: document [", d.begin, ", ", d.end, ") of row ", d.row, " in ",
                          rows, " x ", length,
                          " tokens is empty, out of range, or overlaps the one before it"));
    }
    last = d;
  }
}

}  // namespace

CausalLmBatch CausalLmBatch::to(at::Device device) const {
  return {input_ids.to(device), position_ids.to(device), loss_rows.to(device),
          loss_targets.to(device), spans};
}

CausalLmBatch make_batch(int64_t rows, int64_t length, std::span<const int64_t> input_ids,
                         std::span<const int64_t> labels, std::span<const int64_t> position_ids,
                         std::span<const DocumentSpan> documents) {
  check_sizes(rows, length, input_ids.size(), labels.size(), position_ids.size());
  check_documents(rows, length, documents);
  std::vector<int64_t> ids, positions, loss_rows, targets;
  auto spans = std::make_shared<AttentionSpans>();
  for (const DocumentSpan& d : documents) {
    spans->spans.push_back({spans->tokens(), spans->tokens() + d.end - d.begin});
    for (int64_t column = d.begin; column < d.end; ++column) {
      const auto at = static_cast<size_t>(d.row * length + column);
      if (column + 1 < d.end && labels[at + 1] != kIgnoredLabel) {
        loss_rows.push_back(static_cast<int64_t>(ids.size()));
        targets.push_back(labels[at + 1]);
      }
      ids.push_back(input_ids[at]);
      positions.push_back(position_ids.empty() ? column - d.begin : position_ids[at]);
    }
  }
  return {as_tensor(ids), as_tensor(positions), as_tensor(loss_rows), as_tensor(targets),
          std::move(spans)};
}

CausalLmBatch make_batch(const at::Tensor& input_ids, const at::Tensor& labels) {
  const int64_t rows = input_ids.size(0), length = input_ids.size(1);
  const at::Tensor ids = input_ids.cpu().contiguous(), targets = labels.cpu().contiguous();
  std::vector<DocumentSpan> documents;
  for (int64_t row = 0; length > 0 && row < rows; ++row) documents.push_back({row, 0, length});
  const auto view = [](const at::Tensor& t) {
    return std::span<const int64_t>(t.const_data_ptr<int64_t>(), static_cast<size_t>(t.numel()));
  };
  return make_batch(rows, length, view(ids), view(targets), {}, documents).to(input_ids.device());
}

}  // namespace fsdp::models
