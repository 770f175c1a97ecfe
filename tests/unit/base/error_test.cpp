#include "libfsdp/base/error.h"

#include <gtest/gtest.h>

#include <cmath>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/dtype.h"

namespace fsdp {
namespace {

TEST(ErrorTest, EveryKindCarriesItsExitCode) {
  EXPECT_EQ(static_cast<int>(ConfigError("x").code()), 2);
  EXPECT_EQ(static_cast<int>(DataError("x").code()), 3);
  EXPECT_EQ(static_cast<int>(ModelError("x").code()), 4);
  EXPECT_EQ(static_cast<int>(DoesNotFitError("x").code()), 5);
  EXPECT_EQ(static_cast<int>(DeviceMemoryError("x").code()), 6);
  EXPECT_EQ(static_cast<int>(HostResourceError("x").code()), 7);
  EXPECT_EQ(static_cast<int>(CommError("x").code()), 8);
  EXPECT_EQ(static_cast<int>(NumericsError("x").code()), 9);
  EXPECT_EQ(static_cast<int>(InternalError("x").code()), 1);
}

TEST(CheckedTest, OverflowIsAnErrorThatNamesTheQuantity) {
  EXPECT_EQ(checked_mul(6, 7, "cells"), 42);
  try {
    checked_mul<ModelError>(int64_t{1} << 40, int64_t{1} << 40, "elements of w");
    FAIL() << "no error";
  } catch (const ModelError& error) {
    EXPECT_NE(std::string(error.what()).find("elements of w"), std::string::npos);
  }
  EXPECT_THROW(checked_add(INT64_MAX, 1, "bytes"), InternalError);
}

TEST(DTypeTest, HalvesRoundToNearestEvenAndKeepNan) {
  for (const float value : {0.0F, -0.0F, 1.0F, 65504.0F, 6.1035156e-5F, 5.9604645e-8F, -2.5F}) {
    EXPECT_EQ(f16_to_float(float_to_f16(value)), value);
  }
  EXPECT_EQ(float_to_f16(1.0F + 1.0F / 2048),
            float_to_f16(1.0F));  // a tie goes to the even neighbour
  EXPECT_TRUE(std::isinf(f16_to_float(float_to_f16(70000.0F))));
  EXPECT_TRUE(std::isnan(f16_to_float(float_to_f16(std::nanf("")))));
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(std::nanf("")))));
  EXPECT_EQ(bf16_to_float(float_to_bf16(1.0F + 1.0F / 256)), 1.0F);
}

TEST(DTypeTest, NamesReadBack) {
  for (const auto dtype : {DType::kF64, DType::kF32, DType::kF16, DType::kBF16, DType::kI64}) {
    EXPECT_EQ(dtype_from_name(dtype_name(dtype)), dtype);
  }
  EXPECT_THROW(dtype_from_name("float31"), ConfigError);
}

}  // namespace
}  // namespace fsdp
