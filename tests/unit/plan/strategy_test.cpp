#include "libfsdp/plan/strategy.h"

#include <gtest/gtest.h>

#include "libfsdp/base/error.h"

namespace fsdp::plan {
namespace {

PlaceInput ranks_with_units(int ranks, int units) { return {.ranks = ranks, .units = units}; }

TEST(StrategyTest, NamesReadBack) {
  ASSERT_EQ(strategy_names().size(), 5U);
  for (const std::string_view name : strategy_names()) {
    EXPECT_EQ(strategy_name(strategy_from_name(name)), name);
  }
  EXPECT_EQ(strategy_from_name("FULL_SHARD"), Strategy::kFullShard);
  EXPECT_EQ(strategy_from_name("SHARD_GRAD_OP"), Strategy::kShardGradOp);
  EXPECT_EQ(strategy_from_name("HYBRID_SHARD"), Strategy::kHybridShard);
  EXPECT_EQ(strategy_from_name("HYBRID_SHARD_ZERO2"), Strategy::kHybridShardZero2);
  EXPECT_EQ(strategy_from_name("_HYBRID_SHARD_ZERO2"), Strategy::kHybridShardZero2);
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
  const Placement p = place(Strategy::kFullShard, ranks_with_units(4, 12));
  EXPECT_EQ(p.mesh.replicate, 1);
  EXPECT_EQ(p.mesh.shard, 4);
  EXPECT_EQ(p.home, Home::kSlot);
  EXPECT_EQ(p.slots, 2);
  EXPECT_EQ(p.kept_units, 0);
  EXPECT_EQ(p.gradient_slots, 2);
  EXPECT_EQ(p.accumulation, Accumulation::kSharded);
}

TEST(StrategyTest, UnitsInsideEachOtherGetASlotMoreThanTheirDepth) {
  PlaceInput input = ranks_with_units(4, 12);
  for (int depth = 1; depth <= 4; ++depth) {
    input.nesting_depth = depth;
    EXPECT_EQ(place(Strategy::kFullShard, input).slots, depth + 1);
    EXPECT_EQ(place(Strategy::kFullShard, input, {.slots = depth}).slots, depth);
    if (depth > 1) {
      EXPECT_THROW(place(Strategy::kFullShard, input, {.slots = depth - 1}), ConfigError);
      EXPECT_EQ(place(Strategy::kFullShard, input, {.slots = 1, .kept_units = 11}).slots, 1)
          << "one unit alone takes turns";
    }
  }
}

TEST(StrategyTest, ShardGradOpKeepsEveryUnit) {
  const Placement p = place(Strategy::kShardGradOp, ranks_with_units(4, 12));
  EXPECT_EQ(p.mesh.shard, 4);
  EXPECT_EQ(p.home, Home::kSlot);
  EXPECT_EQ(p.kept_units, 12);
  EXPECT_EQ(p.slots, 0);
}

TEST(StrategyTest, HybridShardsAHostAndReplicatesIt) {
  PlaceInput input = ranks_with_units(8, 12);
  input.ranks_per_host = 4;
  for (const Strategy strategy : {Strategy::kHybridShard, Strategy::kHybridShardZero2}) {
    const bool keeps = strategy == Strategy::kHybridShardZero2;
    const Placement p = place(strategy, input);
    EXPECT_EQ(p.mesh.replicate, 2);
    EXPECT_EQ(p.mesh.shard, 4);
    EXPECT_EQ(p.home, Home::kSlot);
    EXPECT_EQ(p.kept_units, keeps ? 12 : 0);
    const Placement pairs = place(strategy, input, {.sharding_group_size = 2});
    EXPECT_EQ(pairs.mesh.replicate, 4);
    EXPECT_EQ(pairs.mesh.shard, 2);
    EXPECT_EQ(place(strategy, input, {.sharding_group_size = 1}).home, Home::kResident);
    for (const int size : {3, 16, -2})
      EXPECT_THROW(place(strategy, input, {.sharding_group_size = size}), ConfigError) << size;
  }
  EXPECT_THROW(place(Strategy::kFullShard, input, {.sharding_group_size = 2}), ConfigError);
  input.ranks_per_host = 3;
  EXPECT_THROW(place(Strategy::kHybridShard, input), ConfigError);
}

TEST(StrategyTest, AShardGroupOnOneHostSharesItsMemory) {
  PlaceInput input = ranks_with_units(8, 12);
  input.can_share = true;
  EXPECT_EQ(place(Strategy::kFullShard, input).home, Home::kShared);
  EXPECT_EQ(place(Strategy::kFullShard, input, {.force_slot_home = true}).home, Home::kSlot);
  input.ranks_per_host = 4;
  EXPECT_EQ(place(Strategy::kFullShard, input).home, Home::kSlot) << "two hosts";
  EXPECT_EQ(place(Strategy::kHybridShard, input).home, Home::kShared);
  EXPECT_EQ(place(Strategy::kHybridShard, input, {.sharding_group_size = 2}).home, Home::kShared);
  EXPECT_EQ(place(Strategy::kHybridShard, input, {.sharding_group_size = 8}).home, Home::kSlot);
  input.ranks_per_host = 6;
  input.ranks = 12;
  EXPECT_EQ(place(Strategy::kHybridShard, input, {.sharding_group_size = 4}).home, Home::kSlot)
      << "the second group lies on two hosts";
  EXPECT_EQ(place(Strategy::kNoShard, input).home, Home::kResident);
}

TEST(StrategyTest, NoShardIsAShardGroupOfOne) {
  const Placement p = place(Strategy::kNoShard, ranks_with_units(4, 12));
  EXPECT_EQ(p.mesh.replicate, 4);
  EXPECT_EQ(p.mesh.shard, 1);
  EXPECT_EQ(p.home, Home::kResident);
}

TEST(StrategyTest, OneRankIsResidentUnlessForced) {
  for (const std::string_view name : strategy_names()) {
    const Strategy strategy = strategy_from_name(name);
    EXPECT_EQ(place(strategy, ranks_with_units(1, 3)).home, Home::kResident) << name;
    EXPECT_EQ(place(strategy, ranks_with_units(1, 3), {.force_slot_home = true}).home, Home::kSlot)
        << name;
  }
}

TEST(StrategyTest, OverridesReplaceTheStrategysChoice) {
  const PlaceInput input = ranks_with_units(2, 12);
  const Placement p =
      place(Strategy::kShardGradOp, input,
            {.slots = 3, .gradient_slots = 1, .accumulation = Accumulation::kUnsharded});
  EXPECT_EQ(p.slots, 3);
  EXPECT_EQ(p.kept_units, 0) << "slots for turns";
  EXPECT_EQ(p.gradient_slots, 1);
  EXPECT_EQ(p.accumulation, Accumulation::kUnsharded);
  EXPECT_EQ(place(Strategy::kFullShard, input, {.kept_units = 5}).kept_units, 5);
  EXPECT_EQ(place(Strategy::kShardGradOp, input, {.kept_units = 0}).kept_units, 0);
  EXPECT_EQ(place(Strategy::kShardGradOp, input, {.kept_units = 0}).slots, 2);
  EXPECT_EQ(place(Strategy::kFullShard, input, {.kept_units = 50}).kept_units, 12);
  EXPECT_THROW(place(Strategy::kFullShard, input, {.slots = -1}), ConfigError);
  EXPECT_THROW(place(Strategy::kFullShard, input, {.gradient_slots = -1}), ConfigError);
  EXPECT_THROW(place(Strategy::kFullShard, input, {.kept_units = -2}), ConfigError);
}

TEST(StrategyTest, NeverMoreSlotsThanUnits) {
  EXPECT_EQ(place(Strategy::kFullShard, ranks_with_units(2, 1)).slots, 1);
  EXPECT_EQ(place(Strategy::kFullShard, ranks_with_units(2, 0)).slots, 0);
  EXPECT_EQ(place(Strategy::kShardGradOp, ranks_with_units(2, 0)).gradient_slots, 1);
  EXPECT_EQ(place(Strategy::kFullShard, ranks_with_units(2, 4), {.slots = 9}).slots, 4);
  EXPECT_EQ(place(Strategy::kFullShard, ranks_with_units(2, 4), {.kept_units = 3}).slots, 1);
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
    const std::vector<int> replicas = mesh.replica_group(rank);
    ASSERT_EQ(replicas.size(), 3U);
    EXPECT_EQ(replicas[static_cast<size_t>(mesh.replicate_coordinate(rank))], rank);
    for (const int replica : replicas)
      EXPECT_EQ(mesh.shard_coordinate(replica), mesh.shard_coordinate(rank));
  }
}

TEST(StrategyTest, ReplicasOnSeveralHostsReduceInTwoLevels) {
  const PlaceInput hosts{.ranks = 8, .ranks_per_host = 4, .units = 3};
  EXPECT_EQ(place(Strategy::kHybridShard, hosts).reduction, Reduction::kTwoLevel);
  EXPECT_EQ(place(Strategy::kNoShard, hosts).reduction, Reduction::kTwoLevel);
  EXPECT_EQ(place(Strategy::kFullShard, hosts).reduction, Reduction::kWorld);
  PlaceInput exact = hosts;
  exact.exact_order = true;
  EXPECT_EQ(place(Strategy::kHybridShard, exact).reduction, Reduction::kWorld);
  EXPECT_THROW(place(Strategy::kHybridShard, exact, {.two_level = true}), ConfigError);
  const PlaceInput one_host{.ranks = 4, .ranks_per_host = 4, .units = 3};
  const PlacementOverrides pairs{.sharding_group_size = 2};
  EXPECT_EQ(place(Strategy::kHybridShard, one_host, pairs).reduction, Reduction::kWorld);
  const PlacementOverrides forced{.sharding_group_size = 2, .two_level = true};
  EXPECT_EQ(place(Strategy::kHybridShard, one_host, forced).reduction, Reduction::kTwoLevel);
}

TEST(StrategyTest, WhatIsOffloadedIsGatheredIntoSlots) {
  const PlaceInput input{.ranks = 2, .can_share = true, .units = 3};
  for (const Strategy strategy : {Strategy::kFullShard, Strategy::kNoShard}) {
    const Placement parameters = place(strategy, input, {.offload = Offload::kParameters});
    EXPECT_EQ(parameters.home, Home::kSlot);
    EXPECT_EQ(parameters.stages, 2);
    EXPECT_EQ(place(strategy, input, {.offload = Offload::kOptimizer}).stages, 4);
    EXPECT_FALSE(place(strategy, input).offloads());
  }
}

}  // namespace
}  // namespace fsdp::plan
