#include "libfsdp/plan/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <tuple>

#include "libfsdp/base/error.h"
#include "tests/unit/plan/schedule_cases.h"

namespace fsdp::plan {
namespace {

TEST(ScheduleTest, ThreeUnitsInTwoSlotsStepByStep) {
  EXPECT_EQ(compile(simple_input(3, 2, 2, 1)).to_string(),
            R"(   0  comm     gather     root    m0   slot 2           after previous 22
   1  comm     gather     unit 1  m0   slot 0
   2  comm     gather     unit 2  m0   slot 1
   3  compute  forward    root    m0   slot 2           after 0
   4  compute  forward    unit 1  m0   slot 0           after 1
   5  comm     gather     unit 3  m0   slot 0           after 4
   6  compute  forward    unit 2  m0   slot 1           after 2
   7  compute  forward    unit 3  m0   slot 0           after 5
   8  compute  backward   unit 3  m0   slot 0
   9  comm     gather     unit 1  m0   slot 0           after 8
  10  compute  collect    unit 3  m0   gradient slot 0
  11  comm     reduce     unit 3  m0   gradient slot 0  after 10
  12  compute  backward   unit 2  m0   slot 1
  13  compute  collect    unit 2  m0   gradient slot 1
  14  comm     reduce     unit 2  m0   gradient slot 1  after 13
  15  compute  backward   unit 1  m0   slot 0           after 9
  16  compute  collect    unit 1  m0   gradient slot 0  after 11 released
  17  comm     reduce     unit 1  m0   gradient slot 0  after 16
  18  compute  backward   root    m0   slot 2
  19  compute  collect    root    m0   gradient slot 2
  20  comm     reduce     root    m0   gradient slot 2  after 19
  21  compute  packet             m0                    after 20
  22  compute  optimizer          m0
)");
}

// The text from operation `from` on.
std::string text_from(const Schedule& schedule, int from) {
  std::string text = schedule.to_string();
  for (; from > 0; --from) text.erase(0, text.find('\n') + 1);
  return text;
}

TEST(ScheduleTest, TheNextMicroBatchStartsWithWhatLiesInTheSlots) {
  EXPECT_EQ(text_from(compile(simple_input(3, 2, 2, 2)), 21),
            R"(  21  compute  forward    root    m1   slot 2
  22  compute  forward    unit 1  m1   slot 0
  23  comm     gather     unit 3  m1   slot 0                       after 22
  24  compute  forward    unit 2  m1   slot 1
  25  compute  forward    unit 3  m1   slot 0                       after 23
  26  compute  backward   unit 3  m1   slot 0
  27  comm     gather     unit 1  m1   slot 0                       after 26
  28  compute  collect    unit 3  m1   gradient slot 0              after 17 released
  29  comm     reduce     unit 3  m1   gradient slot 0, accumulate  after 28
  30  compute  backward   unit 2  m1   slot 1
  31  compute  collect    unit 2  m1   gradient slot 1              after 14 released
  32  comm     reduce     unit 2  m1   gradient slot 1, accumulate  after 31
  33  compute  backward   unit 1  m1   slot 0                       after 27
  34  compute  collect    unit 1  m1   gradient slot 0              after 29 released
  35  comm     reduce     unit 1  m1   gradient slot 0, accumulate  after 34
  36  compute  backward   root    m1   slot 2
  37  compute  collect    root    m1   gradient slot 2              after 20 released
  38  comm     reduce     root    m1   gradient slot 2, accumulate  after 37
  39  compute  packet             m1                                after 38
  40  compute  optimizer          m1
)");
}

// Unit 1 holds slot 0 from its forward to its return and from its backward to the end of that,
// however often unit 2 is called inside it.
TEST(ScheduleTest, AUnitInsideAnotherStepByStep) {
  ScheduleInput input = input_for({0, 0, 1, 0}, {{0}, {1, 0}, {2, 1}, {2, 1}, {3, 0}},
                                  {.mesh = {1, 2}, .slots = 2, .gradient_slots = 1});
  EXPECT_EQ(text_from(compile(input), 3),
            R"(   3  compute  forward    root    m0   slot 2           after 0
   4  compute  forward    unit 1  m0   slot 0           after 1
   5  compute  forward    unit 2  m0   slot 1           after 2
   6  compute  forward    unit 1  m0   slot 0, resumed
   7  compute  forward    unit 2  m0   slot 1
   8  compute  forward    unit 1  m0   slot 0, resumed
   9  comm     gather     unit 3  m0   slot 0           after 8
  10  compute  forward    unit 3  m0   slot 0           after 9
  11  compute  backward   unit 3  m0   slot 0
  12  comm     gather     unit 1  m0   slot 0           after 11
  13  compute  collect    unit 3  m0   gradient slot 0
  14  comm     reduce     unit 3  m0   gradient slot 0  after 13
  15  compute  backward   unit 1  m0   slot 0           after 12
  16  compute  backward   unit 2  m0   slot 1
  17  compute  backward   unit 2  m0   slot 1
  18  compute  collect    unit 2  m0   gradient slot 0  after 14 released
  19  comm     reduce     unit 2  m0   gradient slot 0  after 18
  20  compute  backward   unit 1  m0   slot 0, resumed
  21  compute  collect    unit 1  m0   gradient slot 0  after 19 released
  22  comm     reduce     unit 1  m0   gradient slot 0  after 21
  23  compute  backward   root    m0   slot 2
  24  compute  collect    root    m0   gradient slot 1
  25  comm     reduce     root    m0   gradient slot 1  after 24
  26  compute  packet             m0                    after 25
  27  compute  optimizer          m0
)");
}

TEST(ScheduleTest, RecomputeRunsTheForwardAgainInsideTheBackward) {
  // What runs inside a recomputed unit is seen without graph at first.
  ScheduleInput input = input_for({0, 0, 1, 0}, {{0}, {1, 0}, {2, 1, false}, {2, 1, false}, {3, 0}},
                                  {.mesh = {1, 2}, .slots = 2, .gradient_slots = 1});
  input.recompute = true;
  const std::string text = text_from(compile(input), 15);
  EXPECT_EQ(text.substr(0, text.find("  27  ")),
            R"(  15  compute  backward   unit 1  m0   slot 0                        after 12
  16  compute  forward    unit 2  m0   slot 1, in backward
  17  compute  forward    unit 1  m0   slot 0, resumed, in backward
  18  compute  forward    unit 2  m0   slot 1, in backward
  19  compute  forward    unit 1  m0   slot 0, resumed, in backward
  20  compute  backward   unit 2  m0   slot 1
  21  compute  backward   unit 2  m0   slot 1
  22  compute  collect    unit 2  m0   gradient slot 0               after 14 released
  23  comm     reduce     unit 2  m0   gradient slot 0               after 22
  24  compute  backward   unit 1  m0   slot 0, resumed
  25  compute  collect    unit 1  m0   gradient slot 0               after 23 released
  26  comm     reduce     unit 1  m0   gradient slot 0               after 25
)");
}

TEST(ScheduleTest, UnshardedSumsAreReducedOnceAStep) {
  const ScheduleInput input =
      input_for({0, 0, 0}, calls_in_order({1, 2}),
                {.mesh = {1, 2}, .slots = 1, .accumulation = Accumulation::kUnsharded}, 2);
  EXPECT_EQ(text_from(compile(input), 9),
            R"(   9  compute  backward   unit 1  m0   slot 0                       after 7
  10  compute  collect    unit 1  m0   gradient slot 1
  11  compute  backward   root    m0   slot 1
  12  compute  collect    root    m0   gradient slot 2
  13  compute  forward    root    m1   slot 1
  14  compute  forward    unit 1  m1   slot 0
  15  comm     gather     unit 2  m1   slot 0                       after 14
  16  compute  forward    unit 2  m1   slot 0                       after 15
  17  compute  backward   unit 2  m1   slot 0
  18  comm     gather     unit 1  m1   slot 0                       after 17
  19  compute  collect    unit 2  m1   gradient slot 0, accumulate
  20  comm     reduce     unit 2  m1   gradient slot 0              after 19
  21  compute  backward   unit 1  m1   slot 0                       after 18
  22  compute  collect    unit 1  m1   gradient slot 1, accumulate
  23  comm     reduce     unit 1  m1   gradient slot 1              after 22
  24  compute  backward   root    m1   slot 1
  25  compute  collect    root    m1   gradient slot 2, accumulate
  26  comm     reduce     root    m1   gradient slot 2              after 25
  27  compute  packet             m1                                after 26
  28  compute  optimizer          m1
)");
}

TEST(ScheduleTest, ReplicasAddTheirSumsOnceAStep) {
  ScheduleInput input = simple_input(3, 2, 1, 2);
  input.placement.mesh = {2, 2};
  input.placement.reduction = Reduction::kTwoLevel;
  const Schedule schedule = compile(input);
  EXPECT_EQ(count(schedule, OpKind::kReduce), 4 * 2);
  EXPECT_EQ(count(schedule, OpKind::kReduceOuter), 4);
  EXPECT_EQ(count(schedule, OpKind::kGatherOuter), 4);
  for (const Op& op : schedule.ops) {
    const bool outer = op.kind == OpKind::kReduceOuter;
    EXPECT_TRUE(op.kind != OpKind::kReduce || op.scope == Scope::kShardGroup);
    EXPECT_TRUE(!outer || (op.scope == Scope::kReplicas && op.micro_batch == 1));
  }
  // Behind the collection that needs the slot anyway, so that nobody waits more.
  const int outer = find_op(schedule, OpKind::kReduceOuter, 3);
  EXPECT_EQ(outer, find_op(schedule, OpKind::kCollect, 2, 1) + 1);
  EXPECT_LT(find_op(schedule, OpKind::kReduceOuter, 0), find_op(schedule, OpKind::kPacket, -1));
}

TEST(ScheduleTest, OffloadedShardsAreFetchedAsSoonAsTheirStageIsFree) {
  ScheduleInput input = simple_input(2, 2, 1, 1);
  input.placement.stages = 2;
  input.slots =
      assign_slots(make_layout(make_units({0, 0, 0}, {true, true, true}), {1, 2}), input.placement);
  EXPECT_EQ(compile(input).to_string(),
            R"(   0  copy     fetch       root    m0   stage 0          after previous 22
   1  copy     fetch       unit 1  m0   stage 1
   2  comm     gather      root    m0   slot 2, stage 0  after 0
   3  copy     fetch       unit 2  m0   stage 0          after 2 released
   4  comm     gather      unit 1  m0   slot 0, stage 1  after 1
   5  comm     gather      unit 2  m0   slot 1, stage 0  after 3
   6  compute  forward     root    m0   slot 2           after 2
   7  compute  forward     unit 1  m0   slot 0           after 4
   8  compute  forward     unit 2  m0   slot 1           after 5
   9  compute  backward    unit 2  m0   slot 1
  10  compute  collect     unit 2  m0   gradient slot 0
  11  comm     reduce      unit 2  m0   gradient slot 0  after 10
  12  copy     store sums  unit 2  m0   gradient slot 0  after 11
  13  compute  backward    unit 1  m0   slot 0
  14  compute  collect     unit 1  m0   gradient slot 0  after 11 released
  15  comm     reduce      unit 1  m0   gradient slot 0  after 12, 14
  16  copy     store sums  unit 1  m0   gradient slot 0  after 15
  17  compute  backward    root    m0   slot 2
  18  compute  collect     root    m0   gradient slot 1
  19  comm     reduce      root    m0   gradient slot 1  after 18
  20  copy     store sums  root    m0   gradient slot 1  after 19
  21  compute  packet              m0                    after 20
  22  compute  optimizer           m0
)");
}

TEST(ScheduleTest, InTheSharedHomeAFenceTakesThePlaceOfGathers) {
  const Schedule s = compile(with_home(simple_input(1, 1, 1, 1), Home::kShared));
  EXPECT_EQ(s.to_string(),
            R"(   0  compute  forward    root    m0
   1  compute  forward    unit 1  m0
   2  compute  backward   unit 1  m0
   3  compute  collect    unit 1  m0   gradient slot 0
   4  comm     reduce     unit 1  m0   gradient slot 0  after 3
   5  compute  backward   root    m0
   6  compute  collect    root    m0   gradient slot 1
   7  comm     reduce     root    m0   gradient slot 1  after 6
   8  compute  packet             m0                    after 7
   9  compute  optimizer          m0
  10  compute  fence              m0
)");
  for (const Op& op : s.ops) {
    for (const Access& access : op.accesses) {
      const bool model = op.kind == OpKind::kForward || op.kind == OpKind::kBackward;
      EXPECT_EQ(access.by_peers, model || (op.kind == OpKind::kReduce && !access.write));
    }
  }
}

// A gather is over one replica: when it ends, the other replicas may still read the gradients that
// a reduction before it takes. Nobody else learns in the frozen units that follow unit 5.
TEST(ScheduleTest, AGatherTellsOfItsOwnShardGroupAlone) {
  for (const Mesh& mesh : {Mesh{1, 2}, Mesh{2, 2}}) {
    ScheduleInput input = input_for(std::vector<int>(6, 0), calls_in_order({1, 2, 3, 4, 5}),
                                    {.mesh = mesh, .slots = 1, .gradient_slots = 1}, 2);
    for (const size_t frozen : {0, 1, 2, 3, 4}) input.slots.gradient_slot[frozen] = -1;
    const Schedule s = compile(input);
    const int reduce = find_op(s, OpKind::kReduce, 5, 0);
    const std::vector<Dependency> waits = {{reduce, Moment::kReleased, false}};
    EXPECT_EQ(op_like(s, OpKind::kCollect, 5, 1).after,
              mesh.replicate == 1 ? std::vector<Dependency>{} : waits);
  }
}

// Autograd runs the backward calls of one unit one after the other, and adds up on its own.
TEST(ScheduleTest, AUnitCalledTwelveTimesIsGatheredAndCollectedOnce) {
  const ScheduleInput input = input_for({0, 0, 0}, calls_in_order(std::vector<int>(12, 1)),
                                        {.mesh = {1, 2}, .slots = 1}, 2);
  const Schedule s = compile(input);
  EXPECT_EQ(count(s, OpKind::kForward), 2 * 13);
  EXPECT_EQ(count(s, OpKind::kBackward), 2 * 13);
  EXPECT_EQ(count(s, OpKind::kGather), 2) << "unit 2 is never called";
  EXPECT_EQ(count(s, OpKind::kCollect), 2 * 2);
  EXPECT_EQ(count(s, OpKind::kReduce), 2 * 2);
  EXPECT_EQ(s.ops.back().accesses.size(), 4U) << "unit 2 has no gradients to learn from";
}

TEST(ScheduleTest, CallsWithoutGraphHaveNoBackward) {
  const ScheduleInput input =
      input_for({0, 0, 1, 0}, {{0}, {1, 0}, {2, 1, false}, {3, 0, false}, {3, 0}},
                {.mesh = {1, 2}, .slots = 3});
  const Schedule s = compile(input);
  EXPECT_EQ(find_op(s, OpKind::kBackward, 2), -1);
  EXPECT_EQ(find_op(s, OpKind::kReduce, 2), -1);
  EXPECT_EQ(count(s, OpKind::kBackward), 3);
  EXPECT_EQ(count(s, OpKind::kReduce), 3) << "root, 1 and 3";
}

TEST(ScheduleTest, GradientsSwitchedOnAgainInsideACallWithoutThemAreCollected) {
  const ScheduleInput input =
      input_for({0, 0, 1}, {{0}, {1, 0, false}, {2, 1}}, {.mesh = {1, 2}, .slots = 2});
  const Schedule s = compile(input);
  EXPECT_EQ(find_op(s, OpKind::kBackward, 1), -1);
  EXPECT_GE(find_op(s, OpKind::kBackward, 2), 0);
  EXPECT_GE(find_op(s, OpKind::kReduce, 2), 0);
}

using Accesses = std::vector<Access>;

TEST(ScheduleTest, OperationsSayWhatTheyTouch) {
  const Schedule s = compile(simple_input(1, 1, 1, 2));
  const auto at = [&s](OpKind kind, int unit, int micro_batch) -> const Accesses& {
    return op_like(s, kind, unit, micro_batch).accesses;
  };
  using enum BufferKind;
  EXPECT_EQ(at(OpKind::kGather, 0, 0),
            (Accesses{{kShard, 0, false, true}, {kSlot, 1, true, false, 0}}));
  EXPECT_EQ(at(OpKind::kGather, 1, 0),
            (Accesses{{kShard, 1, false, true}, {kSlot, 0, true, false, 1}}));
  EXPECT_EQ(at(OpKind::kForward, 0, 0), (Accesses{{kSlot, 1, false, false, 0}}));
  EXPECT_EQ(at(OpKind::kForward, 1, 1),
            (Accesses{{kSlot, 0, false, false, 1}, {kSlot, 1, false, false, 0}}));
  EXPECT_EQ(at(OpKind::kBackward, 1, 0), at(OpKind::kForward, 1, 1));
  EXPECT_EQ(at(OpKind::kBackward, 0, 0), at(OpKind::kForward, 0, 0));
  EXPECT_EQ(at(OpKind::kCollect, 1, 0), (Accesses{{kGradientSlot, 0, true, false, 1}}));
  EXPECT_EQ(at(OpKind::kReduce, 1, 0),
            (Accesses{{kGradientSlot, 0, false, true, 1}, {kGradientShard, 1, true}}));
  EXPECT_EQ(at(OpKind::kReduce, 1, 1), (Accesses{{kGradientSlot, 0, false, true, 1},
                                                 {kGradientShard, 1},
                                                 {kGradientShard, 1, true}}));
  EXPECT_EQ(at(OpKind::kPacket, -1, 1), (Accesses{{kGradientShard, 0}, {kGradientShard, 1}}));
  EXPECT_EQ(
      at(OpKind::kOptimizer, -1, 1),
      (Accesses{{kGradientShard, 0}, {kShard, 0, true}, {kGradientShard, 1}, {kShard, 1, true}}));
}

TEST(ScheduleTest, UnitsReadThoseAroundThem) {
  const Schedule s = compile(
      input_for({0, 0, 1, 2}, {{0}, {1, 0}, {2, 1}, {3, 2}, {2, 0}}, {.mesh = {1, 2}, .slots = 3}));
  using enum BufferKind;
  EXPECT_EQ(op_like(s, OpKind::kForward, 3).accesses, (Accesses{{kSlot, 2, false, false, 3},
                                                                {kSlot, 1, false, false, 2},
                                                                {kSlot, 0, false, false, 1},
                                                                {kSlot, 3, false, false, 0}}));
  const Op& last = op_like(s, OpKind::kBackward, 2);
  EXPECT_EQ(last.accesses, (Accesses{{kSlot, 1, false, false, 2}, {kSlot, 3, false, false, 0}}))
      << "its last call is not inside unit 1";
}

TEST(ScheduleTest, ResidentUnitsAreReadWhereTheyLie) {
  const Schedule s = compile(with_home(simple_input(2, 2, 1, 1), Home::kResident));
  EXPECT_EQ(count(s, OpKind::kGather), 0);
  EXPECT_EQ(count(s, OpKind::kFence), 0);
  EXPECT_EQ(s.slots, 0);
  const Op& forward = op_like(s, OpKind::kForward, 2);
  EXPECT_EQ(forward.slot, -1);
  EXPECT_EQ(forward.accesses, (Accesses{{BufferKind::kShard, 2}, {BufferKind::kShard, 0}}));
}

TEST(ScheduleTest, FrozenUnitsPassGradientsOnAndReduceNothing) {
  ScheduleInput input = simple_input(3, 2, 1, 1);
  input.trainable = {false, true, false, true};
  input.slots =
      assign_slots(make_layout(make_units({0, 0, 0, 0}, input.trainable), {1, 2}), input.placement);
  const Schedule s = compile(input);
  using enum BufferKind;
  EXPECT_EQ(op_like(s, OpKind::kBackward, 2).accesses,
            (Accesses{{kSlot, 1, false, false, 2}, {kSlot, 2, false, false, 0}}));
  for (const OpKind kind : {OpKind::kCollect, OpKind::kReduce}) {
    EXPECT_EQ(find_op(s, kind, 2), -1);
    EXPECT_EQ(find_op(s, kind, 0), -1);
    EXPECT_EQ(count(s, kind), 2);
  }
}

TEST(ScheduleTest, UnitsWithoutParametersAreCalledButNotGathered) {
  ScheduleInput input = simple_input(3, 2, 1, 1);
  input.slots = assign_slots(
      make_layout(make_units({0, 0, 0, 0}, {true, true, false, true}, {false, false, true, false}),
                  {1, 2}),
      input.placement);
  const Schedule s = compile(input);
  EXPECT_EQ(find_op(s, OpKind::kGather, 2), -1);
  EXPECT_EQ(op_like(s, OpKind::kForward, 2).slot, -1);
  EXPECT_GE(find_op(s, OpKind::kBackward, 2), 0);
}

TEST(ScheduleTest, GathersOfAStepByNumberOfSlots) {
  for (int units = 1; units <= 9; ++units) {
    for (int slots = 1; slots <= units; ++slots) {
      for (int micro_batches = 1; micro_batches <= 3; ++micro_batches) {
        // The first `slots` units lie ready at the start of each micro-batch but the first.
        const int expected = slots + 2 * (units - slots) * micro_batches;
        EXPECT_EQ(count(compile(simple_input(units, slots, 2, micro_batches)), OpKind::kGather),
                  expected + 1)
            << units << " units, " << slots << " slots, " << micro_batches << " micro-batches";
      }
    }
  }
}

TEST(ScheduleTest, KeptUnitsAreGatheredOnceAStep) {
  const std::vector<int> order = {1, 2, 3, 4, 5, 6};
  for (const int micro_batches : {1, 3}) {
    for (int kept = 0; kept <= 6; ++kept) {
      const int turns = 6 - kept;
      const int slots = std::min(2, turns);
      const ScheduleInput input =
          input_for(std::vector<int>(7, 0), calls_in_order(order),
                    {.mesh = {1, 2}, .slots = slots, .kept_units = kept}, micro_batches);
      EXPECT_EQ(count(compile(input), OpKind::kGather),
                1 + kept + slots + 2 * (turns - slots) * micro_batches)
          << kept << " kept";
    }
  }
}

TEST(ScheduleTest, StrategiesAreValuesOfOnePlan) {
  const int units = 12;
  const PlaceInput where{.ranks = 4, .ranks_per_host = 2, .can_share = true, .units = units};
  std::vector<int> order(units);
  std::iota(order.begin(), order.end(), 1);
  for (const int micro_batches : {1, 4}) {
    const auto plan = [&](Strategy strategy, const PlacementOverrides& overrides = {}) {
      return compile(input_for(std::vector<int>(units + 1, 0), calls_in_order(order),
                               place(strategy, where, overrides), micro_batches));
    };
    EXPECT_EQ(count(plan(Strategy::kFullShard), OpKind::kGather),
              1 + 2 + 2 * (units - 2) * micro_batches);
    EXPECT_EQ(count(plan(Strategy::kShardGradOp), OpKind::kGather), 1 + units);
    EXPECT_EQ(count(plan(Strategy::kHybridShardZero2, {.force_slot_home = true}), OpKind::kGather),
              1 + units);
    const Schedule shared = plan(Strategy::kHybridShard);
    EXPECT_EQ(count(shared, OpKind::kGather), 0);
    EXPECT_EQ(count(shared, OpKind::kFence), 1);
    const Schedule replicas = plan(Strategy::kNoShard);
    EXPECT_EQ(count(replicas, OpKind::kGather), 0);
    EXPECT_EQ(count(replicas, OpKind::kFence), 0);
    EXPECT_EQ(count(replicas, OpKind::kReduce), (units + 1) * micro_batches);
  }
}

std::map<int, int> calls_by_unit(const ScheduleInput& input) {
  std::map<int, int> calls;
  for (const Call& call : input.calls) ++calls[call.unit];
  return calls;
}

TEST(ScheduleTest, UnitsAreCollectedAndReducedOnceAMicroBatch) {
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    const ScheduleInput input = random_input(random, 12);
    SCOPED_TRACE(describe(input));
    const Schedule s = compile(input);
    const bool unsharded = input.placement.accumulation == Accumulation::kUnsharded;
    std::set<std::tuple<OpKind, int, int>> seen;
    std::map<int, int> forwards;
    std::map<int, int> backwards;
    std::map<int, int> collects;
    for (const Op& op : s.ops) {
      forwards[op.unit] += op.kind == OpKind::kForward && !op.resumed && !op.in_backward;
      backwards[op.unit] += op.kind == OpKind::kBackward && !op.resumed;
      if (op.kind != OpKind::kCollect && op.kind != OpKind::kReduce) continue;
      EXPECT_TRUE(seen.insert({op.kind, op.unit, op.micro_batch}).second);
      const bool adds = (op.kind == OpKind::kCollect) == unsharded && op.micro_batch > 0;
      EXPECT_EQ(op.accumulate, adds);
      collects[op.unit] += op.kind == OpKind::kCollect;
      if (op.kind == OpKind::kReduce && unsharded) {
        EXPECT_EQ(op.micro_batch, input.micro_batches - 1);
      }
    }
    for (const auto& [unit, calls] : calls_by_unit(input)) {
      EXPECT_EQ(forwards[unit], calls * input.micro_batches) << "unit " << unit;
      if (unit == 0) continue;
      EXPECT_LE(backwards[unit], calls * input.micro_batches) << "unit " << unit;
      const bool trains = backwards[unit] > 0 && input.trainable[static_cast<size_t>(unit)];
      EXPECT_EQ(collects[unit], trains ? input.micro_batches : 0) << "unit " << unit;
    }
    EXPECT_EQ(find_op(s, OpKind::kPacket, -1) + 1, find_op(s, OpKind::kOptimizer, -1));
    EXPECT_EQ(count(s, OpKind::kFence), input.placement.home == Home::kShared);
    if (HasFailure()) return;
  }
}

TEST(ScheduleTest, AUnitKeepsItsSlotsForTheWholeStep) {
  for (unsigned seed = 0; seed < 100; ++seed) {
    std::mt19937 random(seed);
    const ScheduleInput input = random_input(random, 12);
    SCOPED_TRACE(describe(input));
    for (const Op& op : compile(input).ops) {
      if (op.unit < 0) continue;
      const bool fetch = op.kind == OpKind::kFetch;
      const bool gather = op.kind == OpKind::kGather;
      const bool model = op.kind == OpKind::kForward || op.kind == OpKind::kBackward;
      const bool gradients = !fetch && !gather && !model;
      const auto unit = static_cast<size_t>(op.unit);
      EXPECT_EQ(op.slot, gather || model ? input.slots.slot[unit] : -1);
      EXPECT_EQ(op.gradient_slot, gradients ? input.slots.gradient_slot[unit] : -1);
      EXPECT_EQ(op.stage, fetch || gather ? input.slots.stage[unit] : -1);
    }
  }
}

// What a unit did before the first unit inside it comes last in its backward, and reads its
// parameters: unit 3, which takes turns with unit 1, has to wait for that.
TEST(ScheduleTest, AUnitLiesInItsSlotUntilItsBackwardIsOver) {
  for (const bool inner_trains : {false, true}) {
    ScheduleInput input = input_for({0, 0, 1, 0}, {{0}, {3, 0}, {1, 0}, {2, 2}},
                                    {.mesh = {1, 2}, .slots = 2, .gradient_slots = 2});
    if (!inner_trains) input.slots.gradient_slot[2] = -1;
    const Schedule s = compile(input);
    const int inner = find_op(s, OpKind::kBackward, 2);
    const int again = inner + 1 + (inner_trains ? 2 : 0);  // Behind collect and reduce.
    EXPECT_EQ(s.ops[static_cast<size_t>(again)].kind, OpKind::kBackward);
    EXPECT_EQ(s.ops[static_cast<size_t>(again)].unit, 1);
    EXPECT_TRUE(s.ops[static_cast<size_t>(again)].resumed);
    const Op& gather = s.ops[static_cast<size_t>(again) + 1];
    EXPECT_EQ(gather.kind, OpKind::kGather);
    EXPECT_EQ(gather.unit, 3);
    EXPECT_EQ(gather.after, (std::vector<Dependency>{{again, Moment::kFinished, false}}));
  }
}

std::string error_of(const ScheduleInput& input) {
  try {
    compile(input);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(ScheduleTest, RefusesWhatItCannotCompile) {
  ScheduleInput input = simple_input(3, 2, 2, 1);
  input.slots.gradient_slot.assign(4, -1);
  EXPECT_NE(error_of(input).find("trainable"), std::string::npos) << error_of(input);
  input = simple_input(3, 2, 2, 1);
  for (Call& call : input.calls) call.graph = false;
  input.slots.gradient_slot[0] = -1;
  EXPECT_NE(error_of(input).find("nothing to train"), std::string::npos) << error_of(input);
  input = simple_input(3, 2, 2, 1);
  input.calls.push_back({.unit = 4, .parent = 0});
  EXPECT_NE(error_of(input).find("call 4 is of unit 4 inside call 0; there are 4 units"),
            std::string::npos)
      << error_of(input);
  for (const Call wrong : {Call{0, 0}, Call{1, -1}, Call{-1, 0}, Call{1, 4}}) {
    input = simple_input(3, 2, 2, 1);
    input.calls.push_back(wrong);
    EXPECT_NE(error_of(input), "accepted");
  }
  EXPECT_NE(error_of(simple_input(3, 2, 2, 0)), "accepted");
  input = simple_input(3, 2, 2, 1);
  input.slots.slot.pop_back();
  EXPECT_NE(error_of(input), "accepted");
  EXPECT_NE(error_of({}), "accepted");
}

TEST(ScheduleTest, RefusesUnitsInsideEachOtherInOneSlot) {
  // Units 1 and 3 take turns in slot 0, and 3 is called inside 1 although its module is elsewhere.
  const ScheduleInput input =
      input_for({0, 0, 0, 0}, {{0}, {1, 0}, {3, 1}}, {.mesh = {1, 2}, .slots = 2});
  EXPECT_NE(error_of(input).find("units 1 and 3 are called inside each other and share slot 0"),
            std::string::npos)
      << error_of(input);
}

TEST(ScheduleTest, HashSeesEveryField) {
  const Schedule base = compile(simple_input(3, 2, 2, 2));
  EXPECT_EQ(base.hash(), compile(simple_input(3, 2, 2, 2)).hash());
  std::set<uint64_t> hashes = {base.hash()};
  const auto changed = [&](const char* what, auto change) {
    Schedule copy = base;
    change(copy);
    EXPECT_TRUE(hashes.insert(copy.hash()).second) << what;
  };
  changed("mesh", [](Schedule& s) { s.mesh.replicate = 2; });
  changed("shard", [](Schedule& s) { s.mesh.shard = 3; });
  changed("slots", [](Schedule& s) { s.slots = 3; });
  changed("gradient slots", [](Schedule& s) { s.gradient_slots = 3; });
  changed("reduction", [](Schedule& s) { s.reduction = Reduction::kTwoLevel; });
  changed("stages", [](Schedule& s) { s.stages = 3; });
  changed("scope", [](Schedule& s) { s.ops[8].scope = Scope::kReplicas; });
  changed("stage", [](Schedule& s) { s.ops[8].stage = 1; });
  changed("micro-batches", [](Schedule& s) { s.micro_batches = 3; });
  changed("kind", [](Schedule& s) { s.ops[8].kind = OpKind::kForward; });
  changed("unit", [](Schedule& s) { s.ops[8].unit = 2; });
  changed("micro-batch", [](Schedule& s) { s.ops[8].micro_batch = 1; });
  changed("slot", [](Schedule& s) { s.ops[8].slot = 1; });
  changed("gradient slot", [](Schedule& s) { s.ops[8].gradient_slot = 1; });
  changed("accumulate", [](Schedule& s) { s.ops[11].accumulate = true; });
  changed("resumed", [](Schedule& s) { s.ops[8].resumed = true; });
  changed("in backward", [](Schedule& s) { s.ops[8].in_backward = true; });
  changed("access", [](Schedule& s) { s.ops[8].accesses.pop_back(); });
  changed("buffer", [](Schedule& s) { s.ops[8].accesses[0].buffer = BufferKind::kShard; });
  changed("index", [](Schedule& s) { s.ops[8].accesses[0].index = 1; });
  changed("write", [](Schedule& s) { s.ops[8].accesses[0].write = true; });
  changed("by peers", [](Schedule& s) { s.ops[8].accesses[0].by_peers = true; });
  changed("access's unit", [](Schedule& s) { s.ops[8].accesses[0].unit = 1; });
  changed("dependency", [](Schedule& s) { s.ops[9].after.clear(); });
  changed("dependency's op", [](Schedule& s) { s.ops[9].after[0].op = 7; });
  changed("moment", [](Schedule& s) { s.ops[9].after[0].moment = Moment::kReleased; });
  changed("step", [](Schedule& s) { s.ops[9].after[0].previous_step = true; });
  changed("op", [](Schedule& s) { s.ops.pop_back(); });
}

TEST(ScheduleTest, TextUsesTheNamesOfUnits) {
  const std::string text = compile(simple_input(1, 1, 1, 1)).to_string({"(root)", "layers.0"});
  EXPECT_NE(text.find("forward    layers.0  m0"), std::string::npos) << text;
  EXPECT_NE(text.find("forward    (root)    m0"), std::string::npos) << text;
}

}  // namespace
}  // namespace fsdp::plan
