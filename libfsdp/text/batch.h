// One micro-batch as row-major arrays of the host.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "libfsdp/text/dataset.h"
#include "libfsdp/text/packing.h"

namespace fsdp::text {

/// A document in a batch: columns [begin, end) of one row.
struct DocumentRange {
  int64_t row = 0;
  int64_t begin = 0;
  int64_t end = 0;
  bool operator==(const DocumentRange&) const = default;
};

/// rows x cols tokens. Rows shorter than the longest one are padded on the right.
///
/// Labels stand where their tokens stand; the model shifts. The first label of every document is
/// kIgnoredLabel, so that shifting never predicts across documents. Padding: label kIgnoredLabel,
/// position 0, in none of `documents`.
struct Batch {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<int32_t> input_ids;
  std::vector<int32_t> labels;
  std::vector<int32_t> position_ids;  ///< from 0 in each document
  std::vector<DocumentRange>
      documents;       ///< what may attend to each other; by row, then from left to right
  int64_t tokens = 0;  ///< without padding
  int64_t trainable_tokens = 0;

  /// Ends of documents as offsets into the flattened arrays, ascending, the last one rows * cols:
  /// cumulative sequence lengths for attention without masks. The padding of a row is a document of
  /// its own here.
  std::vector<int32_t> document_ends() const;
};

/// Lays the samples of each row end to end. No rows give an empty batch.
/// Throws InternalError when the batch would have 2^31 tokens or more.
Batch make_batch(std::span<const Sample> samples, std::span<const Row> rows, int32_t pad_id);

}  // namespace fsdp::text
