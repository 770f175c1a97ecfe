#include "libfsdp/checkpoint/rectangles.h"

#include <algorithm>

#include "libfsdp/base/error.h"

namespace fsdp::checkpoint {
namespace {

std::vector<int64_t> strides_of(std::span<const int64_t> shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * shape[d];
  return strides;
}

/// Cuts within one row of dim `dim` - 1; `row` are the indices of the dims before.
class Cutter {
 public:
  Cutter(std::span<const int64_t> shape, std::vector<Rectangle>& out)
      : shape_(shape), strides_(strides_of(shape)), out_(out) {}

  /// [begin, end) counts from `base`, the first element of the row.
  void cut(size_t dim, int64_t base, int64_t begin, int64_t end) {
    if (begin == end) return;
    const int64_t stride = strides_[dim];
    int64_t first = begin / stride;
    const int64_t last = end / stride, head = begin % stride, tail = end % stride;
    if (head != 0) {
      const int64_t stop = first == last ? tail : stride;
      enter(dim, base, first, head, stop);
      if (first == last) return;
      ++first;
    }
    if (first < last) add(dim, base, first, last);
    if (tail != 0) enter(dim, base, last, 0, tail);
  }

 private:
  void enter(size_t dim, int64_t base, int64_t row, int64_t begin, int64_t end) {
    row_.push_back(row);
    cut(dim + 1, base + row * strides_[dim], begin, end);
    row_.pop_back();
  }
  void add(size_t dim, int64_t base, int64_t first, int64_t last) {
    Rectangle rectangle{.offsets = row_, .sizes = std::vector<int64_t>(row_.size(), 1)};
    rectangle.offsets.push_back(first);
    rectangle.sizes.push_back(last - first);
    for (size_t d = dim + 1; d < shape_.size(); ++d) {
      rectangle.offsets.push_back(0);
      rectangle.sizes.push_back(shape_[d]);
    }
    rectangle.at = base + first * strides_[dim];
    rectangle.numel = (last - first) * strides_[dim];
    out_.push_back(std::move(rectangle));
  }

  std::span<const int64_t> shape_;
  std::vector<int64_t> strides_;
  std::vector<int64_t> row_;
  std::vector<Rectangle>& out_;
};

}  // namespace

std::vector<Rectangle> cut_into_rectangles(std::span<const int64_t> shape, int64_t at,
                                           int64_t numel) {
  int64_t whole = 1;
  for (const int64_t dim : shape) whole *= dim;
  check(at >= 0 && numel >= 0 && at <= whole && numel <= whole - at,
        "cut_into_rectangles: a range outside the tensor");
  std::vector<Rectangle> rectangles;
  if (numel == 0) return rectangles;
  if (shape.empty()) return {Rectangle{.numel = 1}};
  Cutter(shape, rectangles).cut(0, 0, at, at + numel);
  return rectangles;
}

StoredRectangle::StoredRectangle(std::span<const int64_t> shape, std::span<const int64_t> offsets,
                                 std::span<const int64_t> sizes)
    : shape_(shape.begin(), shape.end()),
      offsets_(offsets.begin(), offsets.end()),
      sizes_(sizes.begin(), sizes.end()),
      strides_(strides_of(shape)),
      run_dims_(shape.size()) {
  for (const int64_t size : sizes_) numel_ *= size;
  // A run takes in the dims from the last one on that are whole, and one more.
  bool whole = true;
  while (run_dims_ > 0 && whole) {
    --run_dims_;
    run_numel_ *= sizes_[run_dims_];
    whole = sizes_[run_dims_] == shape_[run_dims_];
  }
}

int64_t StoredRectangle::count_before(int64_t flat) const {
  int64_t rest = numel_, count = 0;
  for (size_t d = 0; d < shape_.size(); ++d) {
    if (rest == 0) return 0;
    const int64_t index = flat / strides_[d] - offsets_[d];
    flat %= strides_[d];
    rest /= sizes_[d];
    if (index < 0) return count;
    if (index >= sizes_[d]) return count + sizes_[d] * rest;
    count += index * rest;
  }
  // A scalar's only element lies before 1.
  return shape_.empty() ? std::min<int64_t>(flat, 1) : count;
}

StoredRectangle::Run StoredRectangle::run_at(int64_t index) const {
  const int64_t within = index % run_numel_;
  int64_t row = index / run_numel_;
  int64_t flat = within;
  if (run_dims_ < shape_.size()) flat += offsets_[run_dims_] * strides_[run_dims_];
  for (size_t d = run_dims_; d-- > 0;) {
    flat += (offsets_[d] + row % sizes_[d]) * strides_[d];
    row /= sizes_[d];
  }
  return {flat, run_numel_ - within};
}

}  // namespace fsdp::checkpoint
