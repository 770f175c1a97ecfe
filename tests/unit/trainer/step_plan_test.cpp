#include "libfsdp/trainer/train.h"

#include <gtest/gtest.h>

#include <set>

#include "libfsdp/base/error.h"

namespace fsdp::trainer {
namespace {

TrainOptions epochs(double count, int64_t accumulation) {
  TrainOptions options;
  options.num_train_epochs = count;
  options.gradient_accumulation_steps = accumulation;
  return options;
}

TEST(StepPlanTest, EveryMicroBatchOfAnEpochIsTrainedOnceAtAnyNumberOfRanks) {
  for (int64_t micro_batches = 1; micro_batches < 30; ++micro_batches) {
    for (int64_t ranks = 1; ranks < 5; ++ranks) {
      for (int64_t accumulation = 1; accumulation < 4; ++accumulation) {
        const auto plan = StepPlan::make(epochs(2, accumulation), micro_batches, ranks);
        ASSERT_EQ(plan.total_steps, 2 * plan.steps_per_epoch());
        std::multiset<std::pair<int64_t, int64_t>> seen;
        for (int64_t step = 0; step < plan.total_steps; ++step) {
          const auto place = plan.place(step);
          ASSERT_LT(place.first, place.end);
          ASSERT_LE(place.end - place.first, ranks * accumulation);
          for (int64_t m = place.first; m < place.end; ++m) seen.insert({place.epoch, m});
        }
        ASSERT_EQ(seen.size(), static_cast<size_t>(2 * micro_batches));
        ASSERT_EQ(std::set(seen.begin(), seen.end()).size(), seen.size());
        EXPECT_EQ(plan.place(plan.total_steps - 1).epoch_after, 2.0);
      }
    }
  }
}

TEST(StepPlanTest, EpochsAreCountedAsHuggingFaceDoes) {
  // 11 micro-batches on 2 ranks are 6 a rank; with accumulation 4 an epoch has 2 steps.
  const auto plan = StepPlan::make(epochs(1, 4), 11, 2);
  EXPECT_EQ(plan.total_steps, 2);
  EXPECT_DOUBLE_EQ(plan.place(0).epoch_after, 4.0 / 6.0);
  EXPECT_DOUBLE_EQ(plan.place(1).epoch_after, 1.0);
}

TEST(StepPlanTest, FractionsOfEpochsRoundUpAndMaxStepsWins) {
  EXPECT_EQ(StepPlan::make(epochs(0.5, 1), 5, 1).total_steps, 3);
  auto options = epochs(3, 1);
  options.max_steps = 7;
  const auto plan = StepPlan::make(options, 5, 1);
  EXPECT_EQ(plan.total_steps, 7);
  EXPECT_EQ(plan.place(6).epoch, 1);
}

}  // namespace
}  // namespace fsdp::trainer
