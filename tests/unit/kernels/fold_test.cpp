#include "libfsdp/kernels/fold.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/element_math.h"
#include "tests/unit/kernels/random_floats.h"

namespace fsdp::kernels {
namespace {

struct Sources {
  std::vector<std::vector<std::byte>> bytes;
  std::vector<const void*> pointers;
  std::vector<std::vector<float>> values;  // what the stored elements are worth
};

Sources random_sources(int count, int64_t n, DType dtype, uint64_t seed) {
  Sources sources;
  for (int k = 0; k < count; ++k) {
    const std::vector<float> wanted = random_floats(n, seed + static_cast<uint64_t>(k));
    std::vector<std::byte> stored(wanted.size() * dtype_bytes(dtype));
    convert_floats(wanted.data(), DType::kF32, stored.data(), dtype, wanted.size());
    std::vector<float> values(wanted.size());
    convert_floats(stored.data(), dtype, values.data(), DType::kF32, wanted.size());
    sources.bytes.push_back(std::move(stored));
    sources.values.push_back(std::move(values));
  }
  for (const auto& stored : sources.bytes) sources.pointers.push_back(stored.data());
  return sources;
}

std::vector<float> sequential_fold(const Sources& sources, std::vector<float> destination,
                                   bool accumulate) {
  for (size_t i = 0; i < destination.size(); ++i) {
    float sum = accumulate ? destination[i] : 0;
    for (size_t k = 0; k < sources.values.size(); ++k) {
      const float value = sources.values[k][i];
      sum = k == 0 && !accumulate ? value : sum + value;
    }
    destination[i] = sum;
  }
  return destination;
}

class FoldTest : public testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(DTypes, FoldTest, testing::Values(DType::kF32, DType::kBF16, DType::kF16),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

TEST_P(FoldTest, RanksFoldFromLeftToRightBitForBit) {
  for (const int count : {0, 1, 2, 3, 4, 5, 8, 11}) {
    for (const int64_t n : {0, 128, 2048, 2176, 10240}) {
      for (const bool accumulate : {false, true}) {
        const Sources sources = random_sources(count, n, GetParam(), 10);
        const std::vector<float> before = random_floats(n, 99);
        std::vector<float> destination = before;
        fold_ranks(destination.data(), sources.pointers, GetParam(), n, accumulate);
        EXPECT_EQ(bits_of(destination), bits_of(sequential_fold(sources, before, accumulate)))
            << count << " sources, n " << n << ", accumulate " << accumulate;
      }
    }
  }
}

TEST_P(FoldTest, SumsThatAreStoredPastTheCachesHaveTheSameBits) {
  constexpr int64_t kLarge = (1 << 21) + 133;  // More than 8 MiB of sums, and a tail.
  const Sources sources = random_sources(5, kLarge, GetParam(), 30);
  std::vector<float> sums(kLarge + 4);
  for (const int64_t at : {0, 1, 4}) {  // At any alignment; what lies before is not written.
    std::fill_n(sums.begin(), 4, 5.0F);
    fold_ranks(sums.data() + at, sources.pointers, GetParam(), kLarge, false);
    const std::vector<float> got(sums.begin() + at, sums.begin() + at + kLarge);
    EXPECT_TRUE(bits_of(got) == bits_of(sequential_fold(sources, got, false))) << at;
    for (int64_t i = 0; i < at; ++i) EXPECT_EQ(sums[static_cast<size_t>(i)], 5.0F) << at;
  }
}

TEST(FoldInPlaceTest, TheDestinationMayBeASource) {
  for (const int count : {1, 2, 3, 4, 5, 8, 11}) {
    for (const int64_t n : {int64_t{128}, int64_t{2176}, int64_t{(1 << 21) + 128}}) {
      if (n > 10000 && count != 5) continue;
      for (int own = 0; own < count; ++own) {
        Sources sources = random_sources(count, n, DType::kF32, 40);
        std::vector<float> destination = sources.values[static_cast<size_t>(own)];
        const std::vector<float> expected = sequential_fold(sources, destination, false);
        sources.pointers[static_cast<size_t>(own)] = destination.data();
        fold_ranks(destination.data(), sources.pointers, DType::kF32, n, false);
        EXPECT_TRUE(bits_of(destination) == bits_of(expected)) << own << " of " << count;
      }
    }
  }
}

TEST_P(FoldTest, AssignAndAddAreTheStepsOfTheFold) {
  constexpr int64_t kNumel = 4224;
  const Sources sources = random_sources(3, kNumel, GetParam(), 20);
  std::vector<float> stepwise(kNumel);
  std::vector<float> fused(kNumel);
  fold_assign(stepwise.data(), sources.pointers[0], GetParam(), kNumel);
  fold_add(stepwise.data(), sources.pointers[1], GetParam(), kNumel);
  fold_add(stepwise.data(), sources.pointers[2], GetParam(), kNumel);
  fold_ranks(fused.data(), sources.pointers, GetParam(), kNumel, false);
  EXPECT_EQ(bits_of(fused), bits_of(stepwise));
}

TEST(FoldErrorTest, RefusesIntegers) {
  std::vector<float> destination(128);
  const std::vector<int32_t> source(128);
  EXPECT_THROW(fold_add(destination.data(), source.data(), DType::kI32, 128), InternalError);
}

}  // namespace
}  // namespace fsdp::kernels
