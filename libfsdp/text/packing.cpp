#include "libfsdp/text/packing.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>

#include "libfsdp/base/error.h"

namespace fsdp::text {

std::vector<Row> single_rows(int64_t samples) {
  std::vector<Row> rows;
  for (int64_t i = 0; i < samples; ++i) rows.push_back({i});
  return rows;
}

std::vector<Row> pack_rows(std::span<const int64_t> lengths, int64_t capacity) {
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto length_of = [&](int64_t i) { return lengths[static_cast<size_t>(i)]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return length_of(a) > length_of(b); });

  std::vector<Row> rows;
  std::set<std::pair<int64_t, size_t>> room;  // (free tokens, row) of the rows with room
  for (const int64_t sample : order) {
    const int64_t length = length_of(sample);
    check(length >= 1 && length <= capacity, "a sample does not fit into a row");
    const auto fit = room.lower_bound({length, 0});
    const bool opens_row = fit == room.end();
    const int64_t free = opens_row ? capacity : fit->first;
    const size_t row = opens_row ? rows.size() : fit->second;
    if (opens_row) {
      rows.emplace_back();
    } else {
      room.erase(fit);
    }
    rows[row].push_back(sample);
    if (free > length) room.emplace(free - length, row);
  }
  for (Row& row : rows) std::sort(row.begin(), row.end());
  std::sort(rows.begin(), rows.end());
  return rows;
}

}  // namespace fsdp::text
