#include "libfsdp/trainer/progress.h"

#include <gtest/gtest.h>

namespace fsdp::trainer {
namespace {

constexpr ProgressState kHalf = {.done = 50,
                                 .total = 100,
                                 .seconds = 60,
                                 .tokens_per_second = 1234.6,
                                 .loss = 2.34567,
                                 .learning_rate = 5e-5};

TEST(ProgressTest, AWideTerminalShowsEverything) {
  EXPECT_EQ(render_progress(kHalf, 100),
            "50/100 50% [===================>                   ]  loss 2.3457  lr 5.00e-05  1235 "
            "tok/s  eta 1:00");
}

TEST(ProgressTest, NoWidthIsExceeded) {
  for (int columns = 0; columns < 200; ++columns) {
    EXPECT_LE(render_progress(kHalf, columns).size(), static_cast<size_t>(columns)) << columns;
  }
  EXPECT_EQ(render_progress(kHalf, 60),
            "50/100 50%  loss 2.3457  lr 5.00e-05  1235 tok/s  eta 1:00");
  EXPECT_EQ(render_progress(kHalf, 30), "50/100 50%  eta 1:00");
}

TEST(ProgressTest, TheStartAndTheEndAreWhole) {
  EXPECT_EQ(render_progress({.total = 10}, 30), "0/10 0% [>            ]  eta ?");
  ProgressState full = kHalf;
  full.done = 100;
  EXPECT_NE(render_progress(full, 120).find("[========================================]"),
            std::string::npos);
  EXPECT_NE(render_progress({}, 40).find("0/0 0%"), std::string::npos);
}

TEST(ProgressTest, ClockTextsAreShort) {
  EXPECT_EQ(clock_text(0), "0:00");
  EXPECT_EQ(clock_text(65.4), "1:05");
  EXPECT_EQ(clock_text(7384), "2:03:04");
  EXPECT_EQ(clock_text(-1), "?");
  EXPECT_EQ(clock_text(1e300), "?");
}

}  // namespace
}  // namespace fsdp::trainer
