#include "libfsdp/plan/slots.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

#include "libfsdp/base/error.h"

namespace fsdp::plan {
namespace {

// Unit u has sizes[u] elements of bf16 and lies inside parents[u]; negative = frozen.
Layout layout_of(const std::vector<int64_t>& sizes, const std::vector<int>& parents = {}) {
  std::vector<UnitSpec> units;
  for (size_t u = 0; u < sizes.size(); ++u) {
    units.push_back(
        {.name = cat("u", u), .params = {}, .parent = parents.empty() ? 0 : parents[u]});
    if (sizes[u] == 0) continue;
    units.back().params.push_back({.name = cat("u", u, ".w"),
                                   .shape = {std::abs(sizes[u])},
                                   .dtype = DType::kBF16,
                                   .trainable = sizes[u] > 0,
                                   .reduce_dtype = DType::kF32});
  }
  return make_layout(std::move(units), {1, 2});
}

Placement turns(int slots, int gradient_slots, int kept = 0) {
  return {.mesh = {1, 2}, .slots = slots, .kept_units = kept, .gradient_slots = gradient_slots};
}

using Slots = std::vector<int>;
using Bytes = std::vector<int64_t>;

TEST(SlotsTest, UnitsTakeTurnsAndTheRootHasItsOwn) {
  const SlotMap map = assign_slots(layout_of({512, 4096, 1024, 8192, 512}), turns(2, 2));
  EXPECT_EQ(map.slot, (Slots{2, 0, 1, 0, 1}));
  EXPECT_EQ(map.gradient_slot, (Slots{2, 1, 0, 1, 0})) << "from the last unit on";
  EXPECT_EQ(map.slots(), 2);
  EXPECT_EQ(map.gradient_slots(), 2);
  EXPECT_EQ(map.slot_bytes, (Bytes{16384, 4096, 4096})) << "whole pages of the largest unit";
  EXPECT_EQ(map.gradient_slot_bytes, (Bytes{4096, 32768, 4096})) << "gradients are fp32";
}

TEST(SlotsTest, TheLastUnitsAreKept) {
  const SlotMap map = assign_slots(layout_of({512, 4096, 1024, 8192, 512}), turns(1, 1, 2));
  EXPECT_EQ(map.slot, (Slots{3, 0, 0, 1, 2}));
  EXPECT_EQ(map.slot_bytes, (Bytes{8192, 16384, 4096, 4096}));
  const SlotMap all = assign_slots(layout_of({512, 4096, 1024}), turns(0, 1, 2));
  EXPECT_EQ(all.slot, (Slots{2, 0, 1}));
}

TEST(SlotsTest, FrozenAndEmptyUnitsTakeNoTurnThatTheyDoNotNeed) {
  const SlotMap map = assign_slots(layout_of({-512, 512, 0, -512, 512}), turns(2, 2));
  EXPECT_EQ(map.slot, (Slots{2, 0, -1, 1, 0}));
  EXPECT_EQ(map.gradient_slot, (Slots{-1, 1, -1, -1, 0}));
  EXPECT_EQ(map.gradient_slot_bytes.back(), 0) << "a frozen root";
  const SlotMap no_root = assign_slots(layout_of({0, 512}), turns(1, 1));
  EXPECT_EQ(no_root.slot, (Slots{-1, 0}));
  EXPECT_EQ(no_root.slot_bytes, (Bytes{4096, 0}));
}

TEST(SlotsTest, WhereParametersLieInPlaceThereAreGradientSlotsOnly) {
  for (const Home home : {Home::kResident, Home::kShared}) {
    Placement placement = turns(2, 1);
    placement.home = home;
    const SlotMap map = assign_slots(layout_of({512, 512, 512}), placement);
    EXPECT_EQ(map.slot, (Slots{-1, -1, -1}));
    EXPECT_EQ(map.slots(), 0);
    EXPECT_EQ(map.slot_bytes, Bytes{0});
    EXPECT_EQ(map.gradient_slot, (Slots{1, 0, 0}));
  }
}

TEST(SlotsTest, UnshardedSumsHaveAGradientSlotEach) {
  Placement placement = turns(2, 1);
  placement.accumulation = Accumulation::kUnsharded;
  const SlotMap map = assign_slots(layout_of({512, 2048, -512, 4096}), placement);
  EXPECT_EQ(map.gradient_slot, (Slots{2, 1, -1, 0}));
  EXPECT_EQ(map.gradient_slot_bytes, (Bytes{16384, 8192, 4096}));
}

TEST(SlotsTest, AUnitNeverGetsTheSlotOfAUnitAroundIt) {
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    std::vector<int64_t> sizes = {512};
    std::vector<int> parents = {0};
    const unsigned units = 1 + random() % 12;
    for (unsigned u = 1; u <= units; ++u) {
      sizes.push_back(random() % 6 == 0 ? 0 : 512);
      parents.push_back(random() % 2 == 0 ? 0 : static_cast<int>(random() % u));
    }
    const Layout layout = layout_of(sizes, parents);
    const int kept = static_cast<int>(random() % units) / 2;
    const Placement placement =
        turns(layout.nesting_depth() + static_cast<int>(random() % 2), 1, kept);
    const SlotMap map = assign_slots(layout, placement);
    std::map<int, int> users;
    for (int unit = 1; unit <= static_cast<int>(units); ++unit) {
      const int slot = map.slot[static_cast<size_t>(unit)];
      ASSERT_EQ(slot >= 0, sizes[static_cast<size_t>(unit)] > 0);
      if (slot < 0) continue;
      ASSERT_LT(slot, map.slots());
      if (++users[slot] > 1) {
        EXPECT_LT(slot, placement.slots) << "a kept unit's slot";
      }
      for (int around = parents[static_cast<size_t>(unit)]; around != 0;
           around = parents[static_cast<size_t>(around)]) {
        ASSERT_NE(map.slot[static_cast<size_t>(around)], slot) << "seed " << seed;
      }
    }
  }
}

TEST(SlotsTest, TooFewSlotsForUnitsInsideEachOtherAreRefused) {
  const Layout layout = layout_of({512, 512, 512, 512}, {0, 0, 1, 2});
  EXPECT_NO_THROW(assign_slots(layout, turns(3, 1)));
  EXPECT_NO_THROW(assign_slots(layout, turns(2, 1, 1)));
  try {
    assign_slots(layout, turns(2, 1));
    FAIL() << "accepted";
  } catch (const ConfigError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("'u3'"), std::string::npos) << text;
    EXPECT_NE(text.find("got 2 slots, need at least 3"), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace fsdp::plan
