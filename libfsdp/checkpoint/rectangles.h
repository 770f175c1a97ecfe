// A contiguous range of a flattened tensor as rectangles, and back: files of the sharded form hold
// rectangles, ranks hold ranges.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fsdp::checkpoint {

/// Elements [offsets[d], offsets[d] + sizes[d]) of each dim d, which are also the elements
/// [at, at + numel) of the flattened tensor.
struct Rectangle {
  std::vector<int64_t> offsets;
  std::vector<int64_t> sizes;
  int64_t at = 0;
  int64_t numel = 0;
};

/// Cuts [at, at + numel) of a tensor into rectangles that are contiguous in it, in
/// order: at most 2 * dims - 1; none when numel is 0, one for a scalar.
/// Throws: InternalError for a range outside the tensor.
std::vector<Rectangle> cut_into_rectangles(std::span<const int64_t> shape, int64_t at,
                                           int64_t numel);

/// Any rectangle of a tensor, stored row-major by itself: where its elements lie in the tensor.
///
/// Elements of the rectangle are in the same order as in the tensor, so what a range of the tensor
/// shares with the rectangle is one range of the rectangle.
class StoredRectangle {
 public:
  /// offsets and sizes must lie inside the shape (the caller has checked numbers from files).
  StoredRectangle(std::span<const int64_t> shape, std::span<const int64_t> offsets,
                  std::span<const int64_t> sizes);

  int64_t numel() const { return numel_; }

  /// How many elements of the rectangle lie before element `flat` of the tensor.
  int64_t count_before(int64_t flat) const;

  /// Elements that follow one another in the tensor too: where element `index` lies, and for how
  /// long (to the end of its run).
  struct Run {
    int64_t flat;
    int64_t numel;
  };
  Run run_at(int64_t index) const;

 private:
  std::vector<int64_t> shape_, offsets_, sizes_;
  std::vector<int64_t> strides_;  // Of the tensor.
  int64_t numel_ = 1;
  size_t run_dims_ = 0;  // Dims before the run's.
  int64_t run_numel_ = 1;
};

}  // namespace fsdp::checkpoint
