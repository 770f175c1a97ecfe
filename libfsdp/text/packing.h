// Which samples share a row of a batch.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fsdp::text {

/// Indices of the samples that stand end to end in one row.
using Row = std::vector<int64_t>;

/// Every sample in a row of its own.
std::vector<Row> single_rows(int64_t samples);

/// Whole samples packed into rows of at most `capacity` tokens: the longest first, each into the
/// fullest row that still has room (best fit decreasing). Depends on nothing but the lengths.
/// Within a row samples are in ascending order, rows are in the order of their first samples, so
/// that unshuffled data stay near the order of their file. Cost:   O(n log n). Throws:
/// InternalError for a length outside [1, capacity].
std::vector<Row> pack_rows(std::span<const int64_t> lengths, int64_t capacity);

}  // namespace fsdp::text
