#include "libfsdp/plan/strategy.h"

#include <gtest/gtest.h>

#include "libfsdp/base/error.h"

namespace fsdp::plan {
namespace {

TEST(StrategyTest, NamesReadBack) {
  ASSERT_EQ(strategy_names().size(), 3U);
  for (const std::string_view name : strategy_names()) {
    EXPECT_EQ(strategy_name(strategy_from_name(name)), name);
  }
  EXPECT_EQ(strategy_from_name("FULL_SHARD"), Strategy::kFullShard);
  EXPECT_EQ(strategy_from_name("SHARD_GRAD_OP"), Strategy::kShardGradOp);
  EXPECT_EQ(strategy_from_name("NO_SHARD"), Strategy::kNoShard);
}

TEST(StrategyTest, RefusesAnUnknownNameAndListsTheKnown) {
  try {
    strategy_from_name("FULLSHARD");
    FAIL() << "accepted";
  } catch (const ConfigError& error) {
    const std::string text = error.what();
    for (const std::string_view name : strategy_names())
      EXPECT_NE(text.find(name), std::string::npos);
    EXPECT_NE(text.find("'FULLSHARD'"), std::string::npos);
  }
}

TEST(StrategyTest, FullShardIsTwoSlots) {
  const Placement p = place(Strategy::kFullShard, 4, 12);
  EXPECT_EQ(p.mesh.replicate, 1);
  EXPECT_EQ(p.mesh.shard, 4);
  EXPECT_EQ(p.home, Home::kSlot);
  EXPECT_EQ(p.slots, 2);
  EXPECT_EQ(p.gradient_slots, 2);
}

TEST(StrategyTest, ShardGradOpIsASlotForEachUnit) {
  const Placement p = place(Strategy::kShardGradOp, 4, 12);
  EXPECT_EQ(p.mesh.shard, 4);
  EXPECT_EQ(p.home, Home::kSlot);
  EXPECT_EQ(p.slots, 12);
}

TEST(StrategyTest, NoShardIsAShardGroupOfOne) {
  const Placement p = place(Strategy::kNoShard, 4, 12);
  EXPECT_EQ(p.mesh.replicate, 4);
  EXPECT_EQ(p.mesh.shard, 1);
  EXPECT_EQ(p.home, Home::kResident);
}

TEST(StrategyTest, OneRankIsResidentUnlessForced) {
  for (const std::string_view name : strategy_names()) {
    EXPECT_EQ(place(strategy_from_name(name), 1, 3).home, Home::kResident) << name;
    EXPECT_EQ(place(strategy_from_name(name), 1, 3, {.force_slot_home = true}).home, Home::kSlot)
        << name;
  }
}

TEST(StrategyTest, OverridesReplaceTheStrategysChoice) {
  const Placement p = place(Strategy::kShardGradOp, 2, 12, {.slots = 3, .gradient_slots = 1});
  EXPECT_EQ(p.slots, 3);
  EXPECT_EQ(p.gradient_slots, 1);
  EXPECT_THROW(place(Strategy::kFullShard, 2, 12, {.slots = -1}), ConfigError);
  EXPECT_THROW(place(Strategy::kFullShard, 2, 12, {.gradient_slots = -1}), ConfigError);
}

TEST(StrategyTest, NeverMoreSlotsThanUnitsAndNeverNone) {
  EXPECT_EQ(place(Strategy::kFullShard, 2, 1).slots, 1);
  EXPECT_EQ(place(Strategy::kFullShard, 2, 0).slots, 1);
  EXPECT_EQ(place(Strategy::kShardGradOp, 2, 0).gradient_slots, 1);
  EXPECT_EQ(place(Strategy::kFullShard, 2, 4, {.slots = 9}).slots, 4);
}

TEST(MeshTest, GroupsPartitionTheWorld) {
  const Mesh mesh{3, 2};
  EXPECT_EQ(mesh.size(), 6);
  EXPECT_EQ(mesh.world(), (std::vector<int>{0, 1, 2, 3, 4, 5}));
  for (const int rank : mesh.world()) {
    const std::vector<int> group = mesh.shard_group(rank);
    ASSERT_EQ(group.size(), 2U);
    EXPECT_EQ(group[static_cast<size_t>(mesh.shard_coordinate(rank))], rank);
    EXPECT_EQ(group[0], mesh.replicate_coordinate(rank) * 2);
    for (const int member : group) EXPECT_EQ(mesh.shard_group(member), group);
  }
}

}  // namespace
}  // namespace fsdp::plan
