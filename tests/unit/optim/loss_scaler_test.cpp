#include "libfsdp/optim/loss_scaler.h"

#include <gtest/gtest.h>

#include <cmath>

#include "libfsdp/base/error.h"

namespace fsdp::optim {
namespace {

TEST(LossScalerTest, GrowsAfterAnIntervalAndBacksOffAtOnce) {
  LossScaler scaler({.growth_interval = 2});
  EXPECT_EQ(scaler.scale(), 65536);
  scaler.update(false);
  EXPECT_EQ(scaler.scale(), 65536);
  scaler.update(false);
  EXPECT_EQ(scaler.scale(), 131072);
  scaler.update(false);
  scaler.update(true);
  EXPECT_EQ(scaler.scale(), 65536);
  EXPECT_EQ(scaler.state(), (LossScalerState{65536, 0}));
}

TEST(LossScalerTest, ContinuesFromASavedState) {
  LossScaler first({.growth_interval = 3});
  first.update(false);
  first.update(false);
  LossScaler second({.growth_interval = 3});
  second.restore(first.state());
  first.update(false);
  second.update(false);
  EXPECT_EQ(second.state(), first.state());
  EXPECT_EQ(second.scale(), 131072);
}

TEST(LossScalerTest, StartsWithTheScaleOfTheMeanLoss) {
  const auto first_scale = [](int64_t tokens) {
    LossScaler scaler;
    scaler.start(tokens);
    return scaler.scale();
  };
  EXPECT_EQ(first_scale(0), 65536);
  EXPECT_EQ(first_scale(1), 65536);
  EXPECT_EQ(first_scale(512), 128);
  EXPECT_EQ(first_scale(513), 64);
  LossScaler scaler;
  scaler.start(512);
  scaler.start(1);
  EXPECT_EQ(scaler.scale(), 128);
  LossScaler resumed;
  resumed.restore({.scale = 7});
  resumed.start(512);
  EXPECT_EQ(resumed.scale(), 7);
}

TEST(LossScalerTest, RefusesOptionsThatMakeNoRule) {
  EXPECT_THROW(LossScaler({.init_scale = 0}), ConfigError);
  EXPECT_THROW(LossScaler({.init_scale = 1e300}), ConfigError);
  EXPECT_THROW(LossScaler({.growth_factor = 1}), ConfigError);
  EXPECT_THROW(LossScaler({.backoff_factor = 1}), ConfigError);
  EXPECT_THROW(LossScaler({.growth_interval = 0}), ConfigError);
}

}  // namespace
}  // namespace fsdp::optim
