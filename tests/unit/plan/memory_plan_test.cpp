#include "libfsdp/plan/memory_plan.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "libfsdp/base/checked.h"
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

// Two bytes beside a 16-bit parameter, `optimizer` bytes of state an element.
StateBytes state_of(const Layout& layout, int64_t optimizer) {
  StateBytes state{
      .master = [](const Bucket& b) { return b.dtype == DType::kBF16 ? b.shard_numel * 2 : 0; }};
  for (const Bucket& b : layout.buckets) {
    if (b.trainable)
      state.optimizer += checked_mul<ConfigError>(b.shard_numel, optimizer, "optimizer state");
  }
  return state;
}

MemoryPlan plan_of(const Layout& layout, const Placement& placement, int64_t optimizer) {
  return plan_memory(layout, placement, state_of(layout, optimizer));
}

Placement fit(const Layout& layout, const Placement& placement, int64_t budget_bytes) {
  return fit_to_budget(layout, placement, state_of(layout, 8), budget_bytes);
}

TEST(MemoryPlanTest, AddsUpTheCategories) {
  const MemoryPlan plan = plan_of(small_layout(2), slots(2), 8);
  // Shards of 2 ranks, rounded up to 256: root 512, a.w 2560, a.f 256, b.w 512.
  const int64_t trainable = 512 + 2560 + 512;
  EXPECT_EQ(plan.parameter_shards, trainable * 2 + 256 * 4);
  EXPECT_EQ(plan.masters, trainable * 2);
  EXPECT_EQ(plan.gradient_shards, 5 * 4096) << "whole pages: 2048, 10240 and 2048 bytes";
  EXPECT_EQ(plan.optimizer_state, trainable * 8);
  // Slots in whole pages: 5120 x 2 + 512 x 4 = three pages, 1024 x 2 = one.
  EXPECT_EQ(plan.gather_slots, (3 + 1) * 4096);
  EXPECT_EQ(plan.gradient_slots, 3 * 4096) << "5120 x 2";
  EXPECT_EQ(plan.root_slots, 2 * 4096);
  EXPECT_EQ(plan.transient(), plan.gather_slots + plan.gradient_slots + plan.root_slots);
  EXPECT_EQ(plan.total(), plan.parameter_shards + plan.masters + plan.gradient_shards +
                              plan.optimizer_state + plan.transient());
}

TEST(MemoryPlanTest, WhereParametersLieInPlaceThereAreNoGatherSlots) {
  for (const Home home : {Home::kResident, Home::kShared}) {
    Placement placement = slots(2);
    placement.home = home;
    const MemoryPlan plan = plan_of(small_layout(2), placement, 8);
    EXPECT_EQ(plan.gather_slots, 0);
    EXPECT_EQ(plan.gradient_slots, 3 * 4096);
    EXPECT_EQ(plan.root_slots, 4096) << "the root's gradient slot alone";
    EXPECT_EQ(plan.parameter_shards, (512 + 2560 + 512) * 2 + 256 * 4);
  }
}

TEST(MemoryPlanTest, UnshardedSumsHaveAGradientSlotForEachUnit) {
  Placement placement = slots(2);
  placement.accumulation = Accumulation::kUnsharded;
  EXPECT_EQ(plan_of(small_layout(2), placement, 8).gradient_slots, (3 + 1) * 4096);
}

TEST(MemoryPlanTest, OffloadedStateIsOnTheHostAndStagesAreNot) {
  Placement placement = slots(2);
  placement.stages = 2;
  const MemoryPlan plan = plan_of(small_layout(2), placement, 8);
  // Shards: root 512 x 2 and b 512 x 2 share stage 0, a 2560 x 2 + 256 x 4 is stage 1. Sums: those
  // of a, 2560 x 4, and of the root, 512 x 4.
  EXPECT_EQ(plan.stages, (1 + 2) * 4096 + (3 + 1) * 4096);
  EXPECT_EQ(plan.total(), plan.transient());
  EXPECT_EQ(plan.transient(),
            plan.gather_slots + plan.gradient_slots + plan.root_slots + plan.stages);
  EXPECT_NE(plan.to_string().find("on the host"), std::string::npos);
  placement.stages = 3;
  EXPECT_EQ(plan_of(small_layout(2), placement, 8).stages, (1 + 2 + 1) * 4096 + (3 + 1) * 4096);
}

TEST(MemoryPlanTest, SumsInTwoLevelsTakePartsOfEqualSizeAndASlotForOne) {
  Placement placement = slots(1);
  placement.mesh = {3, 1};
  placement.reduction = Reduction::kTwoLevel;
  const Layout layout = make_layout({{"", {{"w", {1024}, DType::kF32}}}}, placement.mesh);
  const MemoryPlan plan = plan_of(layout, placement, 0);
  EXPECT_EQ(plan.gradient_shards, 3 * 384 * 4) << "a third of 1024, rounded up to 64";
  EXPECT_EQ(plan.outer_slot, 4096);
}

TEST(MemoryPlanTest, AModelOfARootAloneNeedsItsSlotsOnly) {
  const Layout layout = make_layout({{"", {{"w", {4096}, DType::kF32}}}}, {1, 2});
  const MemoryPlan plan = plan_of(layout, slots(2), 0);
  EXPECT_EQ(plan.gather_slots, 0);
  EXPECT_EQ(plan.gradient_slots, 0);
  EXPECT_EQ(plan.root_slots, 2 * 4096 * 4);
}

TEST(MemoryPlanTest, OverflowIsAnError) {
  const Layout layout = make_layout({{"", {{"w", {int64_t{1} << 60}, DType::kBF16}}}}, {1, 1});
  EXPECT_THROW(plan_of(layout, slots(1), 16), ConfigError);
}

TEST(MemoryPlanTest, TextNamesEveryCategory) {
  const std::string text = plan_of(small_layout(2), slots(2), 8).to_string();
  for (const char* name : {"parameter shards", "masters", "gradient shards", "optimizer state",
                           "gather slots", "gradient slots", "root's slots", "total"}) {
    EXPECT_NE(text.find(name), std::string::npos) << name;
  }
  EXPECT_NE(text.find("28.00 KiB"), std::string::npos) << "optimizer state in\n" << text;
}

// `units` units of one page of bf16 a rank, inside each other in pairs.
Layout even_layout(int units) {
  std::vector<UnitSpec> specs = {{"", {}}};
  for (int unit = 1; unit <= units; ++unit) {
    specs.push_back({cat("u", unit),
                     {{cat("u", unit, ".w"), {4096}, DType::kBF16}},
                     unit % 2 == 0 ? unit - 1 : 0});
  }
  return make_layout(std::move(specs), {1, 2});
}

int64_t total(const Layout& layout, Placement placement, int slots, int kept) {
  placement.slots = slots;
  placement.kept_units = kept;
  return plan_of(layout, placement, 8).total();
}

TEST(FitToBudgetTest, KeepsAsManyUnitsAsFit) {
  const Layout layout = even_layout(6);
  for (const int kept_before : {0, 4, 6}) {
    Placement placement = slots(2);
    placement.slots = std::min(3, 6 - kept_before);
    placement.kept_units = kept_before;
    for (int kept = 0; kept <= 6; ++kept) {
      const int turns = std::min(3, 6 - kept);
      const int64_t exactly = total(layout, placement, turns, kept);
      // As many slots as units are as many as are kept: the larger number is the better one.
      const int most = kept >= 3 ? 6 : kept;
      const Placement fits = fit(layout, placement, exactly);
      EXPECT_EQ(fits.kept_units, most) << kept;
      EXPECT_EQ(fits.slots, std::min(3, 6 - most)) << kept;
      if (most != kept) continue;
      if (kept == 0) {
        EXPECT_THROW(fit(layout, placement, exactly - 1), DoesNotFitError);
      } else if (kept < 3) {
        EXPECT_EQ(fit(layout, placement, exactly - 1).kept_units, kept - 1);
      }
    }
  }
}

TEST(FitToBudgetTest, NeverPlansMoreThanTheBudget) {
  const Layout layout = small_layout(2);
  for (const int64_t budget : {60'000, 64'000, 70'000, 80'000, 100'000}) {
    for (const int kept : {0, 2}) {
      Placement placement = slots(2);
      placement.slots = 2 - kept;
      placement.kept_units = kept;
      try {
        const Placement fits = fit(layout, placement, budget);
        EXPECT_LE(plan_of(layout, fits, 8).total(), budget);
      } catch (const DoesNotFitError&) {
        EXPECT_LT(budget, total(layout, placement, 2, 0));
      }
    }
  }
}

TEST(FitToBudgetTest, OneForcedSlotStaysOne) {
  const Layout layout = small_layout(2);
  Placement placement = slots(2);
  placement.slots = 1;
  const int64_t least = total(layout, placement, 1, 0);
  const Placement fits = fit(layout, placement, least);
  EXPECT_EQ(fits.kept_units, 0);
  EXPECT_EQ(fits.slots, 1);
}

TEST(FitToBudgetTest, KeepsNothingWhereNothingIsGathered) {
  Placement placement = slots(2);
  placement.home = Home::kShared;
  const Placement fits = fit(small_layout(2), placement, 1 << 30);
  EXPECT_EQ(fits.kept_units, 0);
  EXPECT_THROW(fit(small_layout(2), placement, 1000), DoesNotFitError);
}

TEST(FitToBudgetTest, TellsWhatItNeedsAndWhatItGot) {
  try {
    fit(small_layout(2), slots(2), 2048);
    FAIL() << "accepted";
  } catch (const DoesNotFitError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("at least "), std::string::npos) << text;
    EXPECT_NE(text.find("2.00 KiB"), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace fsdp::plan
