#include "libfsdp/plan/race_check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <string_view>

#include "libfsdp/base/error.h"
#include "tests/support/sanitized.h"
#include "tests/unit/plan/mutations.h"
#include "tests/unit/plan/schedule_cases.h"
#include "tests/unit/plan/simulation.h"

namespace fsdp::plan {
namespace {

std::string first_race(const Schedule& schedule, int ranks) {
  const std::vector<Race> races = find_races(schedule, ranks);
  return races.empty() ? "" : races.front().to_string(schedule);
}

// FSDP_TEST_SCALE=long draws ten times as many models.
unsigned draws(unsigned number) {
  const char* scale = std::getenv("FSDP_TEST_SCALE");
  return number * (scale != nullptr && std::string_view(scale) == "long" ? 10 : 1);
}

// A number of ranks on which every dependency counts: shard groups of several, where that matters.
int ranks_that_need_all(std::mt19937& random, const Schedule& schedule) {
  const int replicate = schedule.mesh.replicate;
  return replicate * (2 + static_cast<int>(random() % (replicate == 1 ? 3 : 2)));
}

int some_ranks(std::mt19937& random, const Schedule& schedule) {
  const int replicate = schedule.mesh.replicate;
  return replicate *
         (1 + static_cast<int>(random() % static_cast<unsigned>(replicate == 1 ? 4 : 2)));
}

TEST(RaceCheckTest, CompiledSchedulesAreSafeOnAnyNumberOfRanks) {
  for (unsigned seed = 0; seed < draws(150); ++seed) {
    std::mt19937 random(seed);
    const ScheduleInput input = random_input(random, seed % 10 == 0 ? 40 : 12);
    const Schedule schedule = compile(input);
    const int ranks = some_ranks(random, schedule);
    ASSERT_EQ(first_race(schedule, ranks), "")
        << describe(input) << ", " << ranks << " ranks, seed " << seed;
  }
}

TEST(RaceCheckTest, EveryStrategyIsSafe) {
  for (const std::string_view name : strategy_names()) {
    for (int ranks = 1; ranks <= 4; ++ranks) {
      for (const bool share : {false, true}) {
        const PlaceInput where{
            .ranks = ranks, .ranks_per_host = ranks, .can_share = share, .units = 7};
        for (const bool force : {false, true}) {
          const Placement placement =
              place(strategy_from_name(name), where, {.force_slot_home = force});
          const ScheduleInput input = input_for(
              std::vector<int>(8, 0), calls_in_order({1, 2, 3, 4, 5, 6, 7}), placement, 3);
          EXPECT_EQ(first_race(compile(input), ranks), "") << name << " on " << ranks;
        }
      }
    }
  }
}

// Every placement of `model` that its nesting allows.
std::vector<Placement> placements_of(const Model& model, const Mesh& mesh, Home home) {
  const int units = static_cast<int>(model.parents.size()) - 1;
  const int depth =
      make_layout(make_units(model.parents, std::vector<bool>(model.parents.size())), mesh)
          .nesting_depth();
  std::vector<Placement> placements;
  for (const Accumulation sums : {Accumulation::kSharded, Accumulation::kUnsharded}) {
    for (int kept = 0; kept <= (home == Home::kSlot ? units : 0); ++kept) {
      for (const int slots : {depth, depth + 1}) {
        placements.push_back({.mesh = mesh,
                              .home = home,
                              .slots = std::min(slots, units),
                              .kept_units = kept,
                              .gradient_slots = 1 + kept % 2,
                              .accumulation = sums});
        if (home != Home::kSlot) break;
      }
    }
  }
  return placements;
}

TEST(RaceCheckTest, KnownModelsAreSafeInEveryPlacement) {
  constexpr Mesh kMeshes[] = {{1, 2}, {1, 3}, {2, 2}, {4, 2}, {1, 8}, {4, 1}};
  for (const Model& model : known_models()) {
    for (const Mesh& mesh : kMeshes) {
      for (const Home home : {Home::kSlot, Home::kShared, Home::kResident}) {
        if ((home == Home::kResident) != (mesh.shard == 1)) continue;
        for (const Placement& placement : placements_of(model, mesh, home)) {
          for (int micro_batches = 1; micro_batches <= (mesh.size() > 4 ? 2 : 5); ++micro_batches) {
            ScheduleInput input = input_for(model.parents, model.calls, placement, micro_batches);
            for (const bool recompute : {false, true}) {
              input.recompute = recompute;
              ASSERT_EQ(first_race(compile(input), mesh.size()), "")
                  << model.name << ": " << describe(input);
            }
          }
        }
      }
    }
  }
}

TEST(RaceCheckTest, EverySingleDependencyIsNeeded) {
  int dependencies = 0;
  for (unsigned seed = 0; seed < draws(60); ++seed) {
    std::mt19937 random(seed + 1000);
    const ScheduleInput input = random_input(random, 7);
    const Schedule schedule = compile(input);
    const int ranks = ranks_that_need_all(random, schedule);
    for (const Mutation& mutation : dropped_dependencies(schedule)) {
      ++dependencies;
      ASSERT_NE(first_race(mutation.schedule, ranks), "")
          << mutation.what << ": " << describe(input) << ", " << ranks << " ranks\n"
          << schedule.to_string();
    }
  }
  EXPECT_GT(dependencies, 500);
}

TEST(RaceCheckTest, EveryOperationThatIsNotTheModelsIsNeeded) {
  for (unsigned seed = 0; seed < draws(60); ++seed) {
    std::mt19937 random(seed + 2000);
    const ScheduleInput input = random_input(random, 7);
    const Schedule schedule = compile(input);
    for (const OpKind kind :
         {OpKind::kFence, OpKind::kFetch, OpKind::kGather, OpKind::kCollect, OpKind::kFetchSums,
          OpKind::kReduce, OpKind::kReduceOuter, OpKind::kGatherOuter, OpKind::kStoreSums,
          OpKind::kPacket, OpKind::kOptimizer}) {
      for (const Mutation& mutation : dropped_ops(schedule, kind)) {
        ASSERT_NE(first_race(mutation.schedule, 2 * schedule.mesh.replicate), "")
            << mutation.what << ": " << describe(input) << "\n"
            << schedule.to_string();
      }
    }
  }
}

TEST(RaceCheckTest, MissingGatherBeforeBackwardIsReportedAsWrongContents) {
  const Schedule schedule = compile(simple_input(3, 2, 2, 1));
  const int again = find_op(schedule, OpKind::kBackward, 3) + 1;
  ASSERT_EQ(schedule.ops[static_cast<size_t>(again)].kind, OpKind::kGather);
  ASSERT_EQ(schedule.ops[static_cast<size_t>(again)].unit, 1);
  const std::string text = first_race(without_op(schedule, again), 2);
  EXPECT_NE(text.find("backward of unit 1"), std::string::npos) << text;
  EXPECT_NE(text.find("needs unit 1 of this step, the slot holds unit 3"), std::string::npos)
      << text;
}

TEST(RaceCheckTest, GatherBeforeTheLastReaderOfItsSlotIsReported) {
  const Schedule schedule = compile(simple_input(3, 2, 2, 1));
  const int gather = find_op(schedule, OpKind::kGather, 3);
  const int reader = find_op(schedule, OpKind::kForward, 1);
  ASSERT_EQ(gather, reader + 1);
  EXPECT_NE(first_race(with_op_moved(schedule, gather, reader), 2), "")
      << "with its dependency, a deadlock";
  const Schedule early = with_op_moved(without_dependency(schedule, gather, 0), gather, reader);
  EXPECT_NE(first_race(early, 2), "");
  EXPECT_NE(first_race(early, 1), "");
}

TEST(RaceCheckTest, OptimizerBeforeThePacketIsReported) {
  for (const Home home : {Home::kSlot, Home::kResident, Home::kShared}) {
    Schedule schedule = compile(with_home(simple_input(3, 2, 2, 1), home));
    const int packet = find_op(schedule, OpKind::kPacket, -1);
    EXPECT_NE(first_race(with_op_moved(schedule, packet, packet + 1), 2), "");
    // Even where it waits for everything that the packet waits for.
    schedule.ops[static_cast<size_t>(packet) + 1].after =
        schedule.ops[static_cast<size_t>(packet)].after;
    EXPECT_NE(first_race(with_op_moved(schedule, packet, packet + 1), 2), "");
  }
}

TEST(RaceCheckTest, OnlyPeersMakeReleasedMoreThanFinished) {
  for (const Mesh& mesh : {Mesh{1, 2}, Mesh{2, 1}}) {
    ScheduleInput input = simple_input(3, 2, 1, 1);
    input.placement.mesh = mesh;
    Schedule schedule = compile(input);
    int changed = 0;
    for (Op& op : schedule.ops) {
      for (Dependency& dependency : op.after) {
        if (dependency.moment != Moment::kReleased) continue;
        dependency.moment = Moment::kFinished;
        ++changed;
      }
    }
    ASSERT_GT(changed, 0);
    const std::string text = first_race(schedule, 2);
    EXPECT_NE(text.find("gradient slot 0 of rank "), std::string::npos) << text;
    if (mesh.replicate > 1) continue;  // The peers of a reduction are those of other replicas too.
    EXPECT_EQ(first_race(schedule, 1), "");
  }
}

TEST(RaceCheckTest, AccumulationFlagsAreChecked) {
  for (const Accumulation sums : {Accumulation::kSharded, Accumulation::kUnsharded}) {
    const Schedule schedule = compile(
        input_for({0, 0, 0}, calls_in_order({1, 2}),
                  {.mesh = {1, 2}, .slots = 1, .gradient_slots = 1, .accumulation = sums}, 2));
    ASSERT_EQ(first_race(schedule, 2), "");
    for (size_t i = 0; i < schedule.ops.size(); ++i) {
      const Op& op = schedule.ops[i];
      if (op.kind != OpKind::kReduce && op.kind != OpKind::kCollect) continue;
      Schedule flipped = schedule;
      flipped.ops[i].accumulate = !op.accumulate;
      EXPECT_NE(first_race(flipped, 2), "") << "operation " << i;
    }
  }
}

// Readers of the shared home are other ranks' compute: the fence lets them begin, the packet says
// that they are over. Over replicas the fence is of the shard group alone.
TEST(RaceCheckTest, InTheSharedHomeFenceAndPacketPartPeersFromTheOptimizer) {
  for (const Mesh& mesh : {Mesh{1, 2}, Mesh{2, 2}, Mesh{2, 4}}) {
    const Schedule schedule =
        compile(input_for({0, 0, 1}, {{0}, {1, 0}, {2, 1}},
                          {.mesh = mesh, .home = Home::kShared, .gradient_slots = 1}, 2));
    ASSERT_EQ(first_race(schedule, mesh.size()), "");
    EXPECT_EQ(first_race(schedule, mesh.replicate), "") << "groups of one";
    const Schedule open = without_op(schedule, find_op(schedule, OpKind::kFence, -1));
    const std::string unfenced = first_race(open, mesh.size());
    EXPECT_NE(unfenced.find("forward of unit 0"), std::string::npos) << unfenced;
    EXPECT_NE(unfenced.find("(optimizer"), std::string::npos) << unfenced;
    EXPECT_EQ(first_race(open, mesh.replicate), "") << "groups of one";
    // A packet before the last reader orders that one no more.
    const int packet = find_op(schedule, OpKind::kPacket, -1);
    const int last = find_op(schedule, OpKind::kBackward, 0, 1);
    const std::string late = first_race(with_op_moved(schedule, last, packet), mesh.size());
    EXPECT_NE(late.find("(optimizer, micro-batch 1) on rank "), std::string::npos) << late;
    EXPECT_NE(late.find("writes shard of unit 0"), std::string::npos) << late;
  }
}

TEST(RaceCheckTest, ManyUnitsCompileAndAreCheckedQuickly) {
  for (const Home home : {Home::kSlot, Home::kShared}) {
    for (const int micro_batches : {1, 8}) {
      const ScheduleInput input = with_home(simple_input(512, 2, 2, micro_batches), home);
      const auto begin = std::chrono::steady_clock::now();
      const Schedule schedule = compile(input);
      const auto compiled = std::chrono::steady_clock::now();
      ASSERT_EQ(first_race(schedule, 2), "");
      const auto checked = std::chrono::steady_clock::now();
      const std::chrono::duration<double> compile_s = compiled - begin;
      const std::chrono::duration<double> check_s = checked - compiled;
      RecordProperty(cat("compile_ms_", static_cast<int>(home), "_", micro_batches),
                     static_cast<int>(1e3 * compile_s.count()));
      // Far more than either needs, far less than anything quadratic would.
      const double patience = fsdp::testing::kSanitized ? 20 : 1;
      EXPECT_LT(compile_s.count(), 1.0 * patience) << schedule.ops.size() << " operations";
      EXPECT_LT(check_s.count(), 5.0 * patience) << schedule.ops.size() << " operations";
    }
  }
}

TEST(RaceCheckTest, RefusesRanksThatTheMeshCannotHold) {
  Schedule schedule = compile(simple_input(2, 1, 1, 1));
  schedule.mesh = {2, 2};
  EXPECT_THROW(find_races(schedule, 3), ConfigError);
  EXPECT_THROW(find_races(schedule, 0), ConfigError);
}

// The simulation knows nothing of clocks: it plays the schedule and looks at the data.
TEST(RaceCheckTest, SafeSchedulesPlayWithoutFaultInAnyOrderOfEvents) {
  for (unsigned seed = 0; seed < draws(150); ++seed) {
    std::mt19937 random(seed + 3000);
    const ScheduleInput input = random_input(random, 6);
    const Schedule schedule = compile(input);
    const int ranks = some_ranks(random, schedule);
    for (unsigned run = 0; run < 4; ++run) {
      ASSERT_EQ(simulate(schedule, ranks, 3, seed * 10 + run), "")
          << describe(input) << ", " << ranks << " ranks";
    }
  }
}

TEST(RaceCheckTest, WhatTheCheckerAcceptsAfterAMutationPlaysWithoutFault) {
  int accepted = 0;
  int refused_with_fault = 0;
  int refused = 0;
  for (unsigned seed = 0; seed < draws(25); ++seed) {
    std::mt19937 random(seed + 4000);
    const ScheduleInput input = random_input(random, 4);
    const Schedule schedule = compile(input);
    std::vector<Mutation> mutations = dropped_dependencies(schedule);
    for (auto more : {swapped_neighbours(schedule), changed_slots(schedule)}) {
      mutations.insert(mutations.end(), more.begin(), more.end());
    }
    for (const Mutation& mutation : mutations) {
      const int ranks = 2 * schedule.mesh.replicate;
      const bool safe = find_races(mutation.schedule, ranks).empty();
      std::string fault;
      for (unsigned run = 0; run < 6 && fault.empty(); ++run)
        fault = simulate(mutation.schedule, ranks, 2, seed + 100 * run);
      if (safe) {
        ++accepted;
        ASSERT_EQ(fault, "") << mutation.what << ": " << describe(input) << "\n"
                             << mutation.schedule.to_string();
      } else {
        ++refused;
        refused_with_fault += !fault.empty();
      }
    }
  }
  EXPECT_GT(accepted, 100);
  EXPECT_GT(refused_with_fault, refused / 2)
      << "the simulation sees too few of " << refused << " faults to be a test";
}

}  // namespace
}  // namespace fsdp::plan
