#include "libfsdp/plan/race_check.h"

#include <gtest/gtest.h>

#include "libfsdp/base/error.h"
#include "tests/unit/plan/mutations.h"
#include "tests/unit/plan/schedule_cases.h"
#include "tests/unit/plan/simulation.h"

namespace fsdp::plan {
namespace {

std::string first_race(const Schedule& schedule, int ranks) {
  const std::vector<Race> races = find_races(schedule, ranks);
  return races.empty() ? "" : races.front().to_string(schedule);
}

int some_ranks(std::mt19937& random, const Schedule& schedule) {
  const int replicate = schedule.mesh.replicate;
  return replicate * (1 + static_cast<int>(random() % static_cast<unsigned>(4 / replicate)));
}

TEST(RaceCheckTest, CompiledSchedulesAreSafeOnAnyNumberOfRanks) {
  for (unsigned seed = 0; seed < 150; ++seed) {
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
      for (const bool force : {false, true}) {
        ScheduleInput input = simple_input(7, 1, 1, 3);
        input.placement = place(strategy_from_name(name), ranks, 7, {.force_slot_home = force});
        EXPECT_EQ(first_race(compile(input), ranks), "") << name << " on " << ranks;
      }
    }
  }
}

TEST(RaceCheckTest, EverySingleDependencyIsNeeded) {
  int dependencies = 0;
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed + 1000);
    const ScheduleInput input = random_input(random, 7);
    const Schedule schedule = compile(input);
    const int ranks = schedule.mesh.replicate > 1 ? 4 : 2 + static_cast<int>(random() % 3);
    for (const Mutation& mutation : dropped_dependencies(schedule)) {
      ++dependencies;
      ASSERT_NE(first_race(mutation.schedule, ranks), "")
          << mutation.what << ": " << describe(input) << ", " << ranks << " ranks\n"
          << schedule.to_string();
    }
  }
  EXPECT_GT(dependencies, 500);
}

TEST(RaceCheckTest, EveryGatherReduceAndEndOfStepIsNeeded) {
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed + 2000);
    const ScheduleInput input = random_input(random, 7);
    const Schedule schedule = compile(input);
    for (const OpKind kind :
         {OpKind::kGather, OpKind::kReduce, OpKind::kPacket, OpKind::kOptimizer}) {
      for (const Mutation& mutation : dropped_ops(schedule, kind)) {
        ASSERT_NE(first_race(mutation.schedule, 4), "")
            << mutation.what << ": " << describe(input) << "\n"
            << schedule.to_string();
      }
    }
  }
}

TEST(RaceCheckTest, MissingGatherBeforeBackwardIsReportedAsWrongContents) {
  const Schedule schedule = compile(simple_input(3, 2, 2, 1));
  const int again = 9;
  ASSERT_EQ(schedule.ops[again].kind, OpKind::kGather);
  ASSERT_EQ(schedule.ops[again].unit, 1);
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
  for (const Home home : {Home::kSlot, Home::kResident}) {
    ScheduleInput input = simple_input(3, 2, 2, 1);
    input.placement.home = home;
    Schedule schedule = compile(input);
    const int packet = find_op(schedule, OpKind::kPacket, -1);
    EXPECT_NE(first_race(with_op_moved(schedule, packet, packet + 1), 2), "");
    // Even where it waits for everything that the packet waits for.
    schedule.ops[static_cast<size_t>(packet) + 1].after =
        schedule.ops[static_cast<size_t>(packet)].after;
    EXPECT_NE(first_race(with_op_moved(schedule, packet, packet + 1), 2), "");
  }
}

TEST(RaceCheckTest, OnlyPeersMakeReleasedMoreThanFinished) {
  Schedule schedule = compile(simple_input(3, 2, 1, 1));
  int changed = 0;
  for (Op& op : schedule.ops) {
    for (Dependency& dependency : op.after) {
      if (dependency.moment != Moment::kReleased) continue;
      dependency.moment = Moment::kFinished;
      ++changed;
    }
  }
  ASSERT_GT(changed, 0);
  EXPECT_EQ(first_race(schedule, 1), "");
  const std::string text = first_race(schedule, 2);
  EXPECT_NE(text.find("gradient slot 0 of rank "), std::string::npos) << text;
}

TEST(RaceCheckTest, AccumulationFlagsAreChecked) {
  const Schedule schedule = compile(simple_input(2, 1, 1, 2));
  for (size_t i = 0; i < schedule.ops.size(); ++i) {
    if (schedule.ops[i].kind != OpKind::kReduce) continue;
    Schedule flipped = schedule;
    flipped.ops[i].accumulate = !flipped.ops[i].accumulate;
    EXPECT_NE(first_race(flipped, 2), "") << "operation " << i;
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
  for (unsigned seed = 0; seed < 150; ++seed) {
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
  for (unsigned seed = 0; seed < 25; ++seed) {
    std::mt19937 random(seed + 4000);
    const ScheduleInput input = random_input(random, 4);
    const Schedule schedule = compile(input);
    std::vector<Mutation> mutations = dropped_dependencies(schedule);
    for (auto more : {swapped_neighbours(schedule), changed_slots(schedule)}) {
      mutations.insert(mutations.end(), more.begin(), more.end());
    }
    for (const Mutation& mutation : mutations) {
      const bool safe = find_races(mutation.schedule, 4).empty();
      std::string fault;
      for (unsigned run = 0; run < 6 && fault.empty(); ++run)
        fault = simulate(mutation.schedule, 4, 2, seed + 100 * run);
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
