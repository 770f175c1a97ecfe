#include "libfsdp/kernels/quantized_state.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "tests/unit/kernels/update_cases.h"

namespace fsdp::kernels {
namespace {

TEST(DynamicMapTest, IsSortedAndSymmetricAroundZero) {
  const DynamicMap& map = signed_dynamic_map();
  EXPECT_EQ(map.values[127], 0);
  EXPECT_EQ(map.values[255], 1);
  for (int i = 0; i < 127; ++i) EXPECT_EQ(map.values[i], -map.values[254 - i]) << i;
  for (const DynamicMap* each : {&map, &unsigned_dynamic_map()}) {
    for (int i = 0; i < 255; ++i) {
      EXPECT_LT(each->values[i], each->values[i + 1]) << i;
      EXPECT_GT(each->midpoints[i], each->values[i]) << i;
      EXPECT_LT(each->midpoints[i], each->values[i + 1]) << i;
    }
  }
}

TEST(DynamicMapTest, EveryEntryComesBack) {
  for (const bool is_signed : {true, false}) {
    const DynamicMap& map = is_signed ? signed_dynamic_map() : unsigned_dynamic_map();
    for (int i = 0; i < 256; ++i) {
      uint8_t code = 0;
      find_codes(map.values + i, 1, is_signed, &code);
      EXPECT_EQ(code, i);
    }
  }
}

int64_t count_other_codes(const std::vector<float>& values, bool is_signed) {
  const DynamicMap& map = is_signed ? signed_dynamic_map() : unsigned_dynamic_map();
  std::vector<uint8_t> codes(values.size());
  find_codes(values.data(), static_cast<int64_t>(values.size()), is_signed, codes.data());
  int64_t count = 0;
  for (size_t i = 0; i < values.size(); ++i)
    count += codes[i] != nearest_code(map.midpoints, values[i]) ? 1 : 0;
  return count;
}

// The table that the CPU uses and the search that the GPU uses are one function.
TEST(DynamicMapTest, TheTableFindsWhatTheSearchFinds) {
  constexpr uint32_t kPart = 1 << 16;
  const uint32_t last = float_bits(1.0F);
  const uint32_t stride = test_everything() ? 7 : 997;  // All would take minutes.
  std::vector<float> edges = {1, -1};
  for (const DynamicMap* map : {&signed_dynamic_map(), &unsigned_dynamic_map()}) {
    for (const float midpoint : map->midpoints) {
      for (const float towards : {midpoint, 2.0F, -2.0F})
        edges.push_back(std::nextafter(midpoint, towards));
    }
  }
  for (const bool is_signed : {true, false}) {
    int64_t other = count_other_codes(edges, is_signed);
    std::vector<float> part;
    for (uint32_t bits = 0; bits <= last; bits += stride) {
      part.push_back(bits_float(bits));
      part.push_back(-bits_float(bits));
      if (part.size() < kPart && last - bits >= stride) continue;
      other += count_other_codes(part, is_signed);
      part.clear();
    }
    EXPECT_EQ(other, 0);
  }
}

TEST(QuantizedUpdateTest, CodesAreTheNearestToTheNewMoments) {
  constexpr int64_t kNumel = 3 * kStateBlock + 40;
  UpdateState state(kNumel);
  QuantizedArrays quantized(kNumel);
  // From zero state: the new moments are those of plain AdamW.
  UpdateState plain(kNumel);
  std::fill(plain.first.begin(), plain.first.end(), 0.0F);
  std::fill(plain.second.begin(), plain.second.end(), 0.0F);
  adamw(plain.arrays(ParameterForm::kF32), plain.gradient.data(), plain.first.data(),
        plain.second.data(), kNumel, kAdamW);
  adamw_8bit(state.arrays(ParameterForm::kF32), state.gradient.data(), quantized.pointers(), kNumel,
             kAdamW);
  EXPECT_EQ(bits_of(state.master), bits_of(plain.master));
  for (int64_t begin = 0; begin < kNumel; begin += kStateBlock) {
    const auto block = static_cast<size_t>(begin / kStateBlock);
    float largest1 = 0;
    float largest2 = 0;
    for (int64_t i = begin; i < std::min(kNumel, begin + kStateBlock); ++i) {
      largest1 = std::max(largest1, std::fabs(plain.first[static_cast<size_t>(i)]));
      largest2 = std::max(largest2, plain.second[static_cast<size_t>(i)]);
    }
    EXPECT_EQ(quantized.absmax1[block], largest1);
    EXPECT_EQ(quantized.absmax2[block], largest2);
    for (int64_t i = begin; i < std::min(kNumel, begin + kStateBlock); ++i) {
      const auto at = static_cast<size_t>(i);
      EXPECT_EQ(quantized.code1[at],
                nearest_code(signed_dynamic_map().midpoints, plain.first[at] / largest1));
      EXPECT_EQ(quantized.code2[at],
                nearest_code(unsigned_dynamic_map().midpoints, plain.second[at] / largest2));
    }
  }
}

TEST(QuantizedUpdateTest, BlocksOfZerosStayZero) {
  UpdateState state(kStateBlock);
  std::fill(state.gradient.begin(), state.gradient.end(), 0.0F);
  QuantizedArrays quantized(kStateBlock);
  for (int step = 0; step < 3; ++step) {
    adamw_8bit(state.arrays(ParameterForm::kF32), state.gradient.data(), quantized.pointers(),
               kStateBlock, kAdamW);
  }
  EXPECT_EQ(quantized.absmax1[0], 0);
  EXPECT_EQ(quantized.absmax2[0], 0);
  for (const float value : state.master) EXPECT_TRUE(std::isfinite(value));
}

}  // namespace
}  // namespace fsdp::kernels
