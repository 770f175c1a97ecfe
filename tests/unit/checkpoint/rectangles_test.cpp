#include "libfsdp/checkpoint/rectangles.h"

#include <gtest/gtest.h>

#include <numeric>
#include <set>

#include "libfsdp/base/error.h"
#include "tests/unit/io/expect_error.h"

namespace fsdp::checkpoint {
namespace {

using Shape = std::vector<int64_t>;

int64_t numel_of(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

const std::vector<Shape> kShapes = {{},        {1},          {7},       {3, 4},       {1, 5},
                                    {5, 1},    {2, 3, 4},    {4, 1, 3}, {2, 2, 2, 3}, {1, 1},
                                    {3, 2, 1}, {2, 3, 1, 2}, {0},       {3, 0, 2}};

TEST(RectanglesTest, EveryRangeOfEveryShapeIsCutIntoRectanglesInOrder) {
  for (const Shape& shape : kShapes) {
    const int64_t numel = numel_of(shape);
    for (int64_t begin = 0; begin <= numel; ++begin) {
      for (int64_t end = begin; end <= numel; ++end) {
        const auto rectangles = cut_into_rectangles(shape, begin, end - begin);
        EXPECT_LE(rectangles.size(), std::max<size_t>(2 * shape.size(), 2) - 1);
        int64_t at = begin;
        for (const Rectangle& rectangle : rectangles) {
          EXPECT_EQ(rectangle.at, at);
          EXPECT_EQ(rectangle.numel, numel_of(rectangle.sizes));
          EXPECT_GT(rectangle.numel, 0);
          const StoredRectangle stored(shape, rectangle.offsets, rectangle.sizes);
          for (int64_t i = 0; i < rectangle.numel; ++i) EXPECT_EQ(stored.run_at(i).flat, at++);
        }
        EXPECT_EQ(at, end);
      }
    }
  }
}

/// Flat places of a rectangle's elements, one by one.
std::vector<int64_t> places(const Shape& shape, const Shape& offsets, const Shape& sizes) {
  std::vector<int64_t> flats;
  for (int64_t i = 0; i < numel_of(shape); ++i) {
    int64_t rest = i;
    bool inside = true;
    for (size_t d = shape.size(); d-- > 0;) {
      const int64_t index = rest % shape[d] - offsets[d];
      inside = inside && index >= 0 && index < sizes[d];
      rest /= shape[d];
    }
    if (inside) flats.push_back(i);
  }
  return flats;
}

void check_rectangle(const Shape& shape, const Shape& offsets, const Shape& sizes) {
  const auto expected = places(shape, offsets, sizes);
  const StoredRectangle stored(shape, offsets, sizes);
  ASSERT_EQ(stored.numel(), static_cast<int64_t>(expected.size()));
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto run = stored.run_at(static_cast<int64_t>(i));
    ASSERT_EQ(run.flat, expected[i]);
    for (int64_t k = 0; k < run.numel; ++k)
      ASSERT_EQ(expected[i + static_cast<size_t>(k)], run.flat + k);
  }
  for (int64_t flat = 0; flat <= numel_of(shape); ++flat) {
    const auto before = std::lower_bound(expected.begin(), expected.end(), flat);
    ASSERT_EQ(stored.count_before(flat), before - expected.begin()) << flat;
  }
}

TEST(RectanglesTest, StoredRectanglesKnowTheirPlaceInTheTensor) {
  check_rectangle({}, {}, {});
  for (int64_t o0 = 0; o0 < 3; ++o0)
    for (int64_t s0 = 0; s0 <= 3 - o0; ++s0)
      for (int64_t o1 = 0; o1 < 4; ++o1)
        for (int64_t s1 = 0; s1 <= 4 - o1; ++s1)
          for (int64_t o2 = 0; o2 < 2; ++o2)
            for (int64_t s2 = 0; s2 <= 2 - o2; ++s2)
              check_rectangle({3, 4, 2}, {o0, o1, o2}, {s0, s1, s2});
}

TEST(RectanglesTest, RefusesRangesOutside) {
  const Shape shape = {2, 3};
  EXPECT_ERROR(cut_into_rectangles(shape, 5, 2), InternalError, "outside");
  EXPECT_ERROR(cut_into_rectangles(shape, -1, 2), InternalError, "outside");
}

}  // namespace
}  // namespace fsdp::checkpoint
