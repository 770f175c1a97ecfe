#include "libfsdp/plan/memory_plan.h"

#include <gtest/gtest.h>

#include "libfsdp/base/error.h"

namespace fsdp::plan {
namespace {

// Root: 1000 trainable bf16. Units: 5000 trainable bf16 + 300 frozen f32, and 700 trainable bf16.
Layout small_layout(int shard) {
  return make_layout({{"", {{"root", {1000}, DType::kBF16}}},
                      {"a", {{"a.w", {50, 100}, DType::kBF16}, {"a.f", {300}, DType::kF32, false}}},
                      {"b", {{"b.w", {700}, DType::kBF16}}}},
                     {1, shard});
}

Placement slots(int shard) {
  Placement placement;
  placement.mesh = {1, shard};
  placement.slots = 2;
  placement.gradient_slots = 1;
  return placement;
}

TEST(MemoryPlanTest, AddsUpTheCategories) {
  const MemoryPlan plan = plan_memory(small_layout(2), slots(2), true, 8);
  // Shards of 2 ranks, rounded up to 256: root 512, a.w 2560, a.f 256, b.w 512.
  const int64_t trainable = 512 + 2560 + 512;
  EXPECT_EQ(plan.parameter_shards, trainable * 2 + 256 * 4);
  EXPECT_EQ(plan.master_remainders, trainable * 2);
  EXPECT_EQ(plan.gradient_shards, trainable * 4);
  EXPECT_EQ(plan.optimizer_state, trainable * 8);
  EXPECT_EQ(plan.gather_slots, 2 * (5120 * 2 + 512 * 4));
  EXPECT_EQ(plan.gradient_slots, 5120 * 2);
  EXPECT_EQ(plan.root_slots, 2 * 1024 * 2);
  EXPECT_EQ(plan.transient(), plan.gather_slots + plan.gradient_slots + plan.root_slots);
  EXPECT_EQ(plan.total(), plan.parameter_shards + plan.master_remainders + plan.gradient_shards +
                              plan.optimizer_state + plan.transient());
}

TEST(MemoryPlanTest, RemaindersOnlyForSplitBf16) {
  EXPECT_EQ(plan_memory(small_layout(2), slots(2), false, 8).master_remainders, 0);
  const Layout f32 = make_layout({{"", {{"w", {1000}, DType::kF32}}}}, {1, 2});
  EXPECT_EQ(plan_memory(f32, slots(2), true, 8).master_remainders, 0);
}

TEST(MemoryPlanTest, ResidentHomesHaveNoGatherSlots) {
  Placement placement = slots(1);
  placement.home = Home::kResident;
  const MemoryPlan plan = plan_memory(small_layout(1), placement, false, 8);
  EXPECT_EQ(plan.gather_slots, 0);
  EXPECT_EQ(plan.gradient_slots, 5120 * 2);
  EXPECT_EQ(plan.root_slots, 1024 * 2) << "the root's gradient slot alone";
}

TEST(MemoryPlanTest, AModelOfARootAloneNeedsItsSlotsOnly) {
  const Layout layout = make_layout({{"", {{"w", {512}, DType::kF32}}}}, {1, 2});
  const MemoryPlan plan = plan_memory(layout, slots(2), false, 0);
  EXPECT_EQ(plan.gather_slots, 0);
  EXPECT_EQ(plan.gradient_slots, 0);
  EXPECT_EQ(plan.root_slots, 2 * 512 * 4);
}

TEST(MemoryPlanTest, OverflowIsAnError) {
  const Layout layout = make_layout({{"", {{"w", {int64_t{1} << 60}, DType::kBF16}}}}, {1, 1});
  EXPECT_THROW(plan_memory(layout, slots(1), false, 16), ConfigError);
}

TEST(MemoryPlanTest, TextNamesEveryCategory) {
  const std::string text = plan_memory(small_layout(2), slots(2), true, 8).to_string();
  for (const char* name :
       {"parameter shards", "master remainders", "gradient shards", "optimizer state",
        "gather slots", "gradient slots", "root's slots", "total"}) {
    EXPECT_NE(text.find(name), std::string::npos) << name;
  }
  EXPECT_NE(text.find("28.00 KiB"), std::string::npos) << "optimizer state in\n" << text;
}

}  // namespace
}  // namespace fsdp::plan
