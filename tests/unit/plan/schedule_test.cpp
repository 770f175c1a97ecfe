#include "libfsdp/plan/schedule.h"

#include <gtest/gtest.h>

#include <set>

#include "libfsdp/base/error.h"
#include "tests/unit/plan/schedule_cases.h"

namespace fsdp::plan {
namespace {

TEST(ScheduleTest, ThreeUnitsInTwoSlotsStepByStep) {
  EXPECT_EQ(compile(simple_input(3, 2, 2, 1)).to_string(),
            R"(   0  comm     gather     root    m0   slot 2                   after previous 18
   1  comm     gather     unit 1  m0   slot 0
   2  comm     gather     unit 2  m0   slot 1
   3  compute  forward    root    m0   slot 2                   after 0
   4  compute  forward    unit 1  m0   slot 0                   after 1
   5  comm     gather     unit 3  m0   slot 0                   after 4
   6  compute  forward    unit 2  m0   slot 1                   after 2
   7  compute  forward    unit 3  m0   slot 0                   after 5
   8  compute  backward   unit 3  m0   slot 0, gradient slot 0
   9  comm     gather     unit 1  m0   slot 0                   after 8
  10  comm     reduce     unit 3  m0   gradient slot 0
  11  compute  backward   unit 2  m0   slot 1, gradient slot 1
  12  comm     reduce     unit 2  m0   gradient slot 1          after 11
  13  compute  backward   unit 1  m0   slot 0, gradient slot 0  after 10 released
  14  comm     reduce     unit 1  m0   gradient slot 0          after 13
  15  compute  backward   root    m0   slot 2, gradient slot 2
  16  comm     reduce     root    m0   gradient slot 2          after 15
  17  compute  packet             m0                            after 16
  18  compute  optimizer          m0
)");
}

TEST(ScheduleTest, TheNextMicroBatchStartsWithWhatLiesInTheSlots) {
  const std::string text = compile(simple_input(3, 2, 2, 2)).to_string();
  const size_t second = text.find("  17  ");
  ASSERT_NE(second, std::string::npos);
  EXPECT_EQ(text.substr(second),
            R"(  17  compute  forward    root    m1   slot 2
  18  compute  forward    unit 1  m1   slot 0
  19  comm     gather     unit 3  m1   slot 0                       after 18
  20  compute  forward    unit 2  m1   slot 1
  21  compute  forward    unit 3  m1   slot 0                       after 19
  22  compute  backward   unit 3  m1   slot 0, gradient slot 0      after 16 released
  23  comm     gather     unit 1  m1   slot 0                       after 22
  24  comm     reduce     unit 3  m1   gradient slot 0, accumulate
  25  compute  backward   unit 2  m1   slot 1, gradient slot 1
  26  comm     reduce     unit 2  m1   gradient slot 1, accumulate  after 25
  27  compute  backward   unit 1  m1   slot 0, gradient slot 0      after 24 released
  28  comm     reduce     unit 1  m1   gradient slot 0, accumulate  after 27
  29  compute  backward   root    m1   slot 2, gradient slot 2
  30  comm     reduce     root    m1   gradient slot 2, accumulate  after 29
  31  compute  packet             m1                                after 30
  32  compute  optimizer          m1
)");
}

using Accesses = std::vector<Access>;

TEST(ScheduleTest, OperationsSayWhatTheyTouch) {
  const Schedule s = compile(simple_input(1, 1, 1, 2));
  const auto at = [&s](OpKind kind, int unit, int micro_batch) -> const Accesses& {
    return s.ops.at(static_cast<size_t>(find_op(s, kind, unit, micro_batch))).accesses;
  };
  using enum BufferKind;
  EXPECT_EQ(at(OpKind::kGather, 0, 0), (Accesses{{kShard, 0, false, true}, {kSlot, 1, true}}));
  EXPECT_EQ(at(OpKind::kGather, 1, 0), (Accesses{{kShard, 1, false, true}, {kSlot, 0, true}}));
  EXPECT_EQ(at(OpKind::kForward, 0, 0), (Accesses{{kSlot, 1}}));
  EXPECT_EQ(at(OpKind::kForward, 1, 1), (Accesses{{kSlot, 0}, {kSlot, 1}}));
  EXPECT_EQ(at(OpKind::kBackward, 1, 0),
            (Accesses{{kSlot, 0}, {kSlot, 1}, {kGradientSlot, 0, true}, {kGradientSlot, 1, true}}));
  EXPECT_EQ(at(OpKind::kBackward, 0, 0), (Accesses{{kSlot, 1}, {kGradientSlot, 1, true}}));
  EXPECT_EQ(at(OpKind::kReduce, 1, 0),
            (Accesses{{kGradientSlot, 0, false, true}, {kGradientShard, 1, true}}));
  EXPECT_EQ(
      at(OpKind::kReduce, 1, 1),
      (Accesses{{kGradientSlot, 0, false, true}, {kGradientShard, 1}, {kGradientShard, 1, true}}));
  EXPECT_EQ(at(OpKind::kPacket, -1, 1), (Accesses{{kGradientShard, 0}, {kGradientShard, 1}}));
  EXPECT_EQ(
      at(OpKind::kOptimizer, -1, 1),
      (Accesses{{kGradientShard, 0}, {kShard, 0, true}, {kGradientShard, 1}, {kShard, 1, true}}));
}

TEST(ScheduleTest, ResidentUnitsAreReadWhereTheyLie) {
  ScheduleInput input = simple_input(2, 2, 1, 1);
  input.placement.home = Home::kResident;
  const Schedule s = compile(input);
  EXPECT_EQ(count(s, OpKind::kGather), 0);
  EXPECT_EQ(s.slots, 0);
  const Op& forward = s.ops.at(static_cast<size_t>(find_op(s, OpKind::kForward, 2)));
  EXPECT_EQ(forward.slot, -1);
  EXPECT_EQ(forward.accesses, (Accesses{{BufferKind::kShard, 2}, {BufferKind::kShard, 0}}));
}

TEST(ScheduleTest, FrozenUnitsPassGradientsOnAndReduceNothing) {
  ScheduleInput input = simple_input(3, 2, 1, 1);
  input.trainable = {false, true, false, true};
  const Schedule s = compile(input);
  const Op& backward = s.ops.at(static_cast<size_t>(find_op(s, OpKind::kBackward, 2)));
  EXPECT_EQ(backward.gradient_slot, -1);
  EXPECT_EQ(backward.accesses, (Accesses{{BufferKind::kSlot, 1}, {BufferKind::kSlot, 2}}));
  EXPECT_EQ(find_op(s, OpKind::kReduce, 2), -1);
  EXPECT_EQ(find_op(s, OpKind::kReduce, 0), -1);
  EXPECT_EQ(count(s, OpKind::kReduce), 2);
}

TEST(ScheduleTest, UnitsWithoutParametersAreCalledButNotGathered) {
  ScheduleInput input = simple_input(3, 2, 1, 1);
  input.has_params = {true, true, false, true};
  input.trainable = input.has_params;
  const Schedule s = compile(input);
  EXPECT_EQ(find_op(s, OpKind::kGather, 2), -1);
  EXPECT_EQ(s.ops.at(static_cast<size_t>(find_op(s, OpKind::kForward, 2))).slot, -1);
  EXPECT_GE(find_op(s, OpKind::kBackward, 2), 0);
}

TEST(ScheduleTest, GathersOfAStepByNumberOfSlots) {
  for (int units = 0; units <= 9; ++units) {
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

TEST(ScheduleTest, StrategiesAreValuesOfOnePlan) {
  const int units = 12;
  for (const int micro_batches : {1, 4}) {
    ScheduleInput input = simple_input(units, 1, 1, micro_batches);
    input.placement = place(Strategy::kFullShard, 4, units);
    EXPECT_EQ(count(compile(input), OpKind::kGather), 1 + 2 + 2 * (units - 2) * micro_batches);
    input.placement = place(Strategy::kShardGradOp, 4, units);
    EXPECT_EQ(count(compile(input), OpKind::kGather), 1 + units);
    input.placement = place(Strategy::kNoShard, 4, units);
    EXPECT_EQ(count(compile(input), OpKind::kGather), 0);
    EXPECT_EQ(count(compile(input), OpKind::kReduce), (units + 1) * micro_batches);
  }
}

TEST(ScheduleTest, EachUnitIsComputedAndReducedOnceAMicroBatch) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    const ScheduleInput input = random_input(random, 12);
    SCOPED_TRACE(describe(input));
    const Schedule s = compile(input);
    std::set<std::tuple<OpKind, int, int>> seen;
    int trainable = input.trainable[0];
    for (const int unit : input.forward_order)
      trainable += input.trainable[static_cast<size_t>(unit)];
    for (const Op& op : s.ops) {
      if (op.kind == OpKind::kGather) continue;
      EXPECT_TRUE(seen.insert({op.kind, op.unit, op.micro_batch}).second);
      EXPECT_EQ(op.accumulate, op.kind == OpKind::kReduce && op.micro_batch > 0);
    }
    const int called = static_cast<int>(input.forward_order.size()) + 1;
    EXPECT_EQ(count(s, OpKind::kForward), called * input.micro_batches);
    EXPECT_EQ(count(s, OpKind::kBackward), called * input.micro_batches);
    EXPECT_EQ(count(s, OpKind::kReduce), trainable * input.micro_batches);
    EXPECT_EQ(s.ops[s.ops.size() - 2].kind, OpKind::kPacket);
    EXPECT_EQ(s.ops.back().kind, OpKind::kOptimizer);
    if (HasFailure()) return;
  }
}

TEST(ScheduleTest, AUnitKeepsItsSlotsForTheWholeStep) {
  for (unsigned seed = 0; seed < 100; ++seed) {
    std::mt19937 random(seed);
    const ScheduleInput input = random_input(random, 12);
    SCOPED_TRACE(describe(input));
    std::map<int, std::set<int>> slots;
    std::map<int, std::set<int>> gradient_slots;
    const Schedule s = compile(input);
    for (const Op& op : s.ops) {
      if (op.unit < 0) continue;
      if (op.kind != OpKind::kReduce) slots[op.unit].insert(op.slot);
      if (op.kind == OpKind::kBackward || op.kind == OpKind::kReduce)
        gradient_slots[op.unit].insert(op.gradient_slot);
    }
    for (const auto& [unit, used] : slots) EXPECT_EQ(used.size(), 1U) << "unit " << unit;
    for (const auto& [unit, used] : gradient_slots) EXPECT_EQ(used.size(), 1U) << "unit " << unit;
    for (size_t call = 0; call < input.forward_order.size() && s.slots > 0; ++call) {
      const int unit = input.forward_order[call];
      const bool has_params = input.has_params[static_cast<size_t>(unit)];
      EXPECT_EQ(*slots[unit].begin(),
                has_params ? slot_of_call(static_cast<int>(call), s.slots) : -1);
    }
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
  input.forward_order = {1, 2, 1};
  EXPECT_NE(error_of(input).find("unit 1 is called twice"), std::string::npos) << error_of(input);
  input = simple_input(3, 2, 2, 1);
  input.trainable.assign(4, false);
  EXPECT_NE(error_of(input).find("trainable"), std::string::npos) << error_of(input);
  input = simple_input(3, 2, 2, 1);
  input.forward_order = {1, 4};
  EXPECT_NE(error_of(input).find("unit 4 is called; expected 1 to 3"), std::string::npos)
      << error_of(input);
  input.forward_order = {0};
  EXPECT_NE(error_of(input), "accepted");
  EXPECT_NE(error_of(simple_input(3, 2, 2, 0)), "accepted");
  EXPECT_NE(error_of(simple_input(3, 0, 2, 1)), "accepted");
  EXPECT_NE(error_of(simple_input(3, 2, 0, 1)), "accepted");
  input = simple_input(3, 2, 2, 1);
  input.has_params.pop_back();
  EXPECT_NE(error_of(input), "accepted");
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
  changed("micro-batches", [](Schedule& s) { s.micro_batches = 3; });
  changed("kind", [](Schedule& s) { s.ops[8].kind = OpKind::kForward; });
  changed("unit", [](Schedule& s) { s.ops[8].unit = 2; });
  changed("micro-batch", [](Schedule& s) { s.ops[8].micro_batch = 1; });
  changed("slot", [](Schedule& s) { s.ops[8].slot = 1; });
  changed("gradient slot", [](Schedule& s) { s.ops[8].gradient_slot = 1; });
  changed("accumulate", [](Schedule& s) { s.ops[10].accumulate = true; });
  changed("access", [](Schedule& s) { s.ops[8].accesses.pop_back(); });
  changed("buffer", [](Schedule& s) { s.ops[8].accesses[0].buffer = BufferKind::kShard; });
  changed("index", [](Schedule& s) { s.ops[8].accesses[0].index = 1; });
  changed("write", [](Schedule& s) { s.ops[8].accesses[0].write = true; });
  changed("by peers", [](Schedule& s) { s.ops[8].accesses[0].by_peers = true; });
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
