#include "libfsdp/kernels/element_math.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/kernels/split_master.h"
#include "tests/unit/kernels/random_floats.h"

namespace fsdp::kernels {
namespace {

constexpr uint32_t kBlock = 1U << 16;

// Splits and joins the 65,536 floats whose upper bits are `upper`; returns how many came back
// changed.
int64_t count_changed(uint32_t upper, std::vector<float>& values, std::vector<float>& joined,
                      std::vector<uint16_t>& high, std::vector<uint16_t>& remainder) {
  for (uint32_t low = 0; low < kBlock; ++low) values[low] = bits_float((upper << 16) | low);
  split_master_cpu(values.data(), high.data(), remainder.data(), kBlock);
  join_master_cpu(high.data(), remainder.data(), joined.data(), kBlock);
  int64_t changed = 0;
  for (uint32_t low = 0; low < kBlock; ++low) {
    const bool both_nan = std::isnan(values[low]) && std::isnan(joined[low]);
    changed += !both_nan && float_bits(values[low]) != float_bits(joined[low]) ? 1 : 0;
  }
  return changed;
}

TEST(SplitMasterTest, EveryFloatComesBackAndNanStaysNan) {
  std::vector<float> values(kBlock);
  std::vector<float> joined(kBlock);
  std::vector<uint16_t> high(kBlock);
  std::vector<uint16_t> remainder(kBlock);
  const uint32_t stride =
      test_everything() ? 1 : 61;  // 61 and 65,536 share no divisor: all exponents are met
  int64_t changed = 0;
  for (uint32_t upper = 0; upper < kBlock; upper += stride) {
    changed += count_changed(upper, values, joined, high, remainder);
  }
  for (const uint32_t edge :
       {0x7f7fU, 0x7f80U, 0x7fffU, 0xff7fU, 0xff80U, 0xffffU, 0x8000U, 0x0000U}) {
    changed += count_changed(edge, values, joined, high, remainder);
  }
  EXPECT_EQ(changed, 0);
}

TEST(SplitMasterTest, ParameterIsTheNearestBfloat16WithTiesAwayFromZero) {
  EXPECT_EQ(split_master(bits_float(0x3f800000)).high, 0x3f80);
  EXPECT_EQ(split_master(bits_float(0x3f807fff)).high, 0x3f80);
  EXPECT_EQ(split_master(bits_float(0x3f808000)).high,
            0x3f81);  // to nearest even it would be 0x3f80
  EXPECT_EQ(split_master(bits_float(0xbf808000)).high, 0xbf81);
  EXPECT_EQ(split_master(-0.0F).high, 0x8000);
  for (uint32_t upper = 0; upper < 0x7f7f; upper += 97) {
    for (const uint32_t low : {0x0001U, 0x7fffU, 0x8001U, 0xffffU}) {
      const float value = bits_float((upper << 16) | low);
      EXPECT_EQ(split_master(value).high, float_to_bf16(value)) << std::hex << upper << ' ' << low;
    }
  }
}

TEST(SplitMasterTest, SpecialValuesStaySpecial) {
  const auto parameter = [](uint32_t bits) {
    return bf16_to_float(split_master(bits_float(bits)).high);
  };
  EXPECT_EQ(parameter(0x7f800000), INFINITY);
  EXPECT_EQ(parameter(0xff800000), -INFINITY);
  for (const uint32_t nan : {0x7f800001U, 0x7fc00000U, 0x7fffffffU, 0xff800001U, 0xffffffffU}) {
    EXPECT_TRUE(std::isnan(parameter(nan))) << std::hex << nan;
  }
}

TEST(WidenTest, HalfEqualsTheReferenceConversionForAllBits) {
  for (uint32_t bits = 0; bits < kBlock; ++bits) {
    const float expected = f16_to_float(static_cast<uint16_t>(bits));
    const float got = F16Source::widen(static_cast<uint16_t>(bits));
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(got)) << std::hex << bits;
    } else {
      EXPECT_EQ(float_bits(got), float_bits(expected)) << std::hex << bits;
    }
  }
}

}  // namespace
}  // namespace fsdp::kernels
