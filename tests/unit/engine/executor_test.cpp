// The executor without LibTorch: a model of numbers whose forwards and backwards are written out
// here.

#include "libfsdp/engine/executor.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <new>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/fake.h"
#include "libfsdp/plan/memory_plan.h"
#include "tests/support/rank_threads.h"

namespace {
thread_local int64_t allocations = 0;  // By this thread, since it started.
}  // namespace

// Sanitizers have an allocator of their own.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
__attribute__((noinline)) void* operator new(size_t bytes) {
  ++allocations;
  if (void* memory = std::malloc(bytes ? bytes : 1)) return memory;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* memory) noexcept { std::free(memory); }
__attribute__((noinline)) void operator delete(void* memory, size_t) noexcept { std::free(memory); }
#endif

namespace fsdp::engine {
namespace {

constexpr int kUnits = 7;  // With the root.
constexpr int kMicroBatches = 2;
constexpr double kRate = 0.5;

plan::Layout make_test_layout(plan::Mesh mesh) {
  std::vector<plan::UnitSpec> units;
  for (int u = 0; u < kUnits; ++u) {
    const std::string name = u == 0 ? "root" : "u" + std::to_string(u);
    units.push_back({.name = name,
                     .params = {{.name = name + ".w", .shape = {100 + 37 * u, 3}},
                                {.name = name + ".b", .shape = {u}},  // The root's has no element.
                                {.name = name + ".s", .shape = {}}}});
  }
  return plan::make_layout(std::move(units), mesh);
}

float initial_value(int bucket, int64_t element) {
  return static_cast<float>(bucket) + 0.001F * static_cast<float>(element % 997);
}

float gradient_value(int unit, int rank, int step, int micro_batch) {
  return static_cast<float>((unit + 1) * (rank + 1)) * 0.25F +
         static_cast<float>(step * 2 + micro_batch);
}

/// One rank's model: knows what every parameter must be.
class NumberModel {
 public:
  explicit NumberModel(Executor& executor) : executor_(executor) {
    const plan::Layout& layout = executor.layout();
    const int coordinate = layout.mesh.shard_coordinate(executor.comm().rank());
    for (const plan::ShardSlice& slice : plan::slices_of(layout, coordinate)) {
      std::vector<float> values;
      const int64_t begin =
          layout.buckets[size_t(slice.bucket)].segments[size_t(slice.segment)].begin;
      for (int64_t i = 0; i < slice.numel; ++i) {
        values.push_back(initial_value(slice.bucket, begin + slice.param_at + i));
      }
      executor.storage().store(slice.bucket, slice.shard_at, values);
    }
    executor.publish();
    executor.set_collector([this](int unit) { write_late_gradient(unit); });
  }

  void forward(int step) {
    executor_.enter_forward(0, true);
    for (int u = 1; u < kUnits; ++u) {
      executor_.enter_forward(u, true);
      expect_parameters(u, step);
      executor_.leave_forward();
    }
    expect_parameters(0, step);
    executor_.leave_forward();
  }

  /// Outside of steps.
  void evaluate(int step) {
    executor_.enter_forward(0, false);
    for (int u = 1; u < kUnits; ++u) {
      executor_.enter_forward(u, false);
      expect_parameters(u, step);
      executor_.leave_forward();
    }
    executor_.leave_forward();
  }

  void backward(int step, int micro_batch) {
    executor_.start_backward(1.0, 1);
    write_gradient(0, step, micro_batch);  // The root's may come at any time.
    for (int u = kUnits - 1; u > 0; --u) {
      executor_.enter_backward(u);
      expect_parameters(u, step);
      write_gradient(u, step, micro_batch);
    }
    executor_.finish_backward();
  }

 private:
  // Sum over ranks and micro-batches of what write_gradient wrote, divided by the tokens: SGD
  // subtracts its multiple.
  float expected_value(int bucket, int64_t element, int step) const {
    float value = initial_value(bucket, element);
    const int ranks = executor_.comm().size();
    for (int s = 0; s < step; ++s) {
      float sum = 0;
      for (int a = 0; a < kMicroBatches; ++a) {
        for (int r = 0; r < ranks; ++r) sum += gradient_value(bucket, r, s, a);
      }
      value -= static_cast<float>(kRate) * sum / static_cast<float>(kMicroBatches * ranks);
    }
    return value;
  }

  void expect_parameters(int unit, int step) {
    const plan::Bucket& bucket = executor_.layout().buckets[size_t(unit)];
    const auto* values = reinterpret_cast<const float*>(executor_.storage().gathered(unit));
    for (const plan::Segment& segment : bucket.segments) {
      for (int64_t i = segment.begin; i < segment.begin + segment.numel; i += 13) {
        const float expected = expected_value(unit, i, step);
        if (std::abs(values[i] - expected) > 1e-4F * std::abs(expected)) ++wrong;
      }
    }
  }

  void write_gradient(int unit, int step, int micro_batch) {
    const plan::Bucket& bucket = executor_.layout().buckets[size_t(unit)];
    auto* values = reinterpret_cast<float*>(executor_.gradient(unit, unit));
    if (!values) {
      late_[unit] = {step, micro_batch};
      return;
    }
    for (size_t s = 0; s < bucket.segments.size(); ++s) {
      const plan::Segment& segment = bucket.segments[s];
      const float value = gradient_value(unit, executor_.comm().rank(), step, micro_batch);
      const bool replaces = executor_.gradient_arrived(unit, static_cast<int>(s));
      for (int64_t i = segment.begin; i < segment.begin + segment.numel; ++i)
        values[i] = value + (replaces ? 0 : values[i]);
    }
  }

  void write_late_gradient(int unit) {
    const auto found = late_.find(unit);
    if (found == late_.end()) return;
    const auto [step, micro_batch] = found->second;
    late_.erase(found);
    write_gradient(unit, step, micro_batch);
    ++late;
  }

  Executor& executor_;
  std::map<int, std::pair<int, int>> late_;  // By unit: step and micro-batch of a gradient.

 public:
  int wrong = 0;
  int late = 0;  // Gradients that came while their slot was in use.
};

struct Setting {
  plan::Strategy strategy;
  int ranks;
  plan::PlacementOverrides overrides;
};

std::unique_ptr<Executor> make_executor(comm::Communicator& own, const Setting& setting) {
  const plan::Placement placement =
      plan::place(setting.strategy, {.ranks = own.size(), .can_share = true, .units = kUnits - 1},
                  setting.overrides);
  ExecutorOptions options{.poison = true,
                          .verify_plans = true,
                          .optimizer = {.kind = optim::OptimizerKind::kSgd},
                          .groups = {{.name = "all"}}};
  return std::make_unique<Executor>(make_test_layout(placement.mesh), placement,
                                    std::shared_ptr<comm::Communicator>(&own, [](auto*) {}),
                                    options);
}

std::vector<Setting> settings() {
  std::vector<Setting> all;
  for (const int ranks : {1, 2, 3, 4}) {
    all.push_back({plan::Strategy::kFullShard, ranks, {.force_slot_home = true}});
    all.push_back({plan::Strategy::kFullShard,
                   ranks,
                   {.slots = 1, .gradient_slots = 1, .force_slot_home = true}});
    all.push_back({plan::Strategy::kFullShard,
                   ranks,
                   {.slots = 3, .gradient_slots = 2, .force_slot_home = true}});
    all.push_back({plan::Strategy::kFullShard, ranks, {}});
    all.push_back({plan::Strategy::kFullShard,
                   ranks,
                   {.slots = 2, .kept_units = 2, .force_slot_home = true}});
    all.push_back({plan::Strategy::kFullShard,
                   ranks,
                   {.force_slot_home = true, .accumulation = plan::Accumulation::kUnsharded}});
    all.push_back({plan::Strategy::kShardGradOp, ranks, {.force_slot_home = true}});
    all.push_back({plan::Strategy::kNoShard, ranks, {}});
    all.push_back({plan::Strategy::kNoShard, ranks, {.two_level = true}});
    for (const plan::Offload offload : {plan::Offload::kParameters, plan::Offload::kOptimizer}) {
      all.push_back({plan::Strategy::kFullShard, ranks, {.offload = offload}});
      all.push_back({plan::Strategy::kFullShard,
                     ranks,
                     {.slots = 1, .gradient_slots = 1, .offload = offload}});
      all.push_back({plan::Strategy::kNoShard, ranks, {.two_level = true, .offload = offload}});
      all.push_back({plan::Strategy::kFullShard,
                     ranks,
                     {.accumulation = plan::Accumulation::kUnsharded, .offload = offload}});
    }
    if (ranks % 2 != 0) continue;
    all.push_back({plan::Strategy::kHybridShard, ranks, {.sharding_group_size = 2}});
    all.push_back(
        {plan::Strategy::kHybridShard, ranks, {.sharding_group_size = 2, .force_slot_home = true}});
    all.push_back({plan::Strategy::kHybridShard,
                   ranks,
                   {.gradient_slots = 1, .sharding_group_size = 2, .two_level = true}});
    all.push_back({plan::Strategy::kHybridShard,
                   ranks,
                   {.sharding_group_size = 2,
                    .accumulation = plan::Accumulation::kUnsharded,
                    .two_level = true,
                    .offload = plan::Offload::kParameters}});
  }
  return all;
}

TEST(Executor, GathersReducesAndUpdatesToTheNumber) {
  for (const Setting& setting : settings()) {
    SCOPED_TRACE(cat(plan::strategy_name(setting.strategy), " on ", setting.ranks, ", slots ",
                     setting.overrides.slots));
    testing::run_ranks(setting.ranks, [&](comm::Communicator& own) {
      auto executor = make_executor(own, setting);
      NumberModel model(*executor);
      for (int step = 0; step < 5; ++step) {
        executor->begin_step(kMicroBatches);
        for (int a = 0; a < kMicroBatches; ++a) {
          model.forward(step);
          model.backward(step, a);
        }
        const StepStats stats = executor->finish_step({.learning_rate = kRate});
        EXPECT_EQ(stats.micro_batches, kMicroBatches * setting.ranks);
      }
      EXPECT_EQ(model.wrong, 0) << "rank " << own.rank();
    });
  }
}

TEST(Executor, EvaluatesWhileRanksWithoutDataJoin) {
  for (const Setting& setting : settings()) {
    SCOPED_TRACE(cat(plan::strategy_name(setting.strategy), " on ", setting.ranks));
    testing::run_ranks(setting.ranks, [&](comm::Communicator& own) {
      auto executor = make_executor(own, setting);
      NumberModel model(*executor);
      for (int step = 0; step < 3; ++step) {
        executor->begin_step(kMicroBatches);
        for (int a = 0; a < kMicroBatches; ++a) {
          model.forward(step);
          model.backward(step, a);
        }
        executor->finish_step({.learning_rate = kRate});
        for (int batch = 0; batch < 3; ++batch) {
          if (batch == 1 && own.rank() % 2 == 1) {
            executor->ghost_forward();
          } else {
            model.evaluate(step + 1);
          }
        }
      }
      EXPECT_EQ(model.wrong, 0) << "rank " << own.rank();
    });
  }
}

TEST(Executor, BeginsTheNextGatherOfAForwardLikeTheOneBefore) {
  comm::FakeCommunicator fake(0, 1, {});
  auto executor =
      make_executor(fake, {plan::Strategy::kFullShard, 1, {.slots = 2, .force_slot_home = true}});
  NumberModel model(*executor);
  const auto gathers = [&] { return fake.count(comm::CollectiveKind::kGather).collectives; };
  model.evaluate(0);
  const int64_t all = gathers();
  EXPECT_EQ(all, kUnits);
  executor->publish();  // What lies in the slots is old now.
  executor->enter_forward(0, false);
  EXPECT_EQ(gathers() - all, 2) << "the root, and the first unit ahead";
  executor->enter_forward(1, false);
  EXPECT_EQ(gathers() - all, 3);
  executor->leave_forward();
  executor->enter_forward(3, false);  // Another order from here on: nothing ahead.
  EXPECT_EQ(gathers() - all, 4);
  executor->leave_forward();
  executor->leave_forward();
}

TEST(Executor, FrozenBucketsWithASlotOfTheirOwnAreGatheredOnce) {
  std::vector<plan::UnitSpec> units = {
      {.name = "", .params = {{"table", {300}, DType::kF32, false}, {"adapters", {64}}}}};
  for (const char* name : {"a", "b", "c"})
    units.push_back({.name = name, .params = {{cat(name, ".w"), {300}, DType::kF32, false}}});
  for (const bool offload : {false, true}) {
    const plan::PlacementOverrides overrides{
        .force_slot_home = true,
        .offload = offload ? plan::Offload::kParameters : plan::Offload::kNone};
    comm::FakeCommunicator fake(0, 1, {});
    const plan::Placement placement =
        plan::place(plan::Strategy::kShardGradOp, {.ranks = 1, .units = 3}, overrides);
    Executor executor(plan::make_layout(units, placement.mesh), placement,
                      std::shared_ptr<comm::Communicator>(&fake, [](auto*) {}),
                      {.verify_plans = true, .groups = {{.name = "all"}}});
    const auto gathers_of_a_step = [&] {
      const int64_t before = fake.count(comm::CollectiveKind::kGather).collectives;
      executor.begin_step(1);
      executor.enter_forward(0, true);
      for (const int unit : {1, 2, 3}) {
        executor.enter_forward(unit, true);
        EXPECT_EQ(reinterpret_cast<const float*>(executor.storage().gathered(unit + 1))[7], 0.5F);
        executor.leave_forward();
      }
      executor.leave_forward();
      executor.start_backward(1, 1);
      for (const int unit : {3, 2, 1}) executor.enter_backward(unit);
      executor.finish_backward();
      executor.finish_step({});
      return fake.count(comm::CollectiveKind::kGather).collectives - before;
    };
    const std::vector<float> values(300, 0.5F);
    const auto fill = [&] {
      for (const int bucket : {1, 2, 3, 4}) executor.storage().store(bucket, 0, values);
      executor.publish();
    };
    fill();
    EXPECT_EQ(gathers_of_a_step(), 5);
    EXPECT_EQ(gathers_of_a_step(), 1) << "what learns, alone";
    fill();
    EXPECT_EQ(gathers_of_a_step(), 5);
    EXPECT_EQ(gathers_of_a_step(), 1);
  }
}

TEST(Executor, AllocatesNothingAfterTheFirstStep) {
  for (const Setting& setting : settings()) {
    SCOPED_TRACE(cat(plan::strategy_name(setting.strategy), " on ", setting.ranks));
    testing::run_ranks(setting.ranks, [&](comm::Communicator& own) {
      auto executor = make_executor(own, setting);
      NumberModel model(*executor);
      int64_t before = 0;
      for (int step = 0; step < 6; ++step) {
        if (step == 1) before = allocations;
        executor->begin_step(kMicroBatches);
        for (int a = 0; a < kMicroBatches; ++a) {
          model.forward(step);
          model.backward(step, a);
        }
        executor->finish_step({.learning_rate = kRate});
      }
      EXPECT_EQ(allocations - before, 0) << "rank " << own.rank();
    });
  }
}

TEST(Executor, TakesTheMemoryThatThePlanSays) {
  for (const Setting& setting : settings()) {
    SCOPED_TRACE(cat(plan::strategy_name(setting.strategy), " on ", setting.ranks));
    testing::run_ranks(setting.ranks, [&](comm::Communicator& own) {
      auto executor = make_executor(own, setting);
      const plan::MemoryPlan planned =
          plan::plan_memory(executor->layout(), executor->placement(),
                            {.master = [](const plan::Bucket&) { return int64_t{0}; }});
      EXPECT_EQ(executor->storage().transient_bytes(), planned.transient());
      executor->storage().keep_sums_apart();  // The plan is of steps with several micro-batches.
      EXPECT_EQ(executor->storage().allocated_bytes(), planned.total());
      EXPECT_EQ(executor->storage().offloaded_bytes(), planned.offloads ? planned.state() : 0);
    });
  }
}

// Units with parameters of 12 to 9000 elements, some of them frozen.
plan::Layout layout_of_sizes(plan::Mesh mesh, DType dtype) {
  std::vector<plan::UnitSpec> units;
  for (const char* unit : {"", "a", "b"}) {
    units.push_back({.name = unit});
    for (const int64_t numel : {12, 300, 1023, 1024, 9000}) {
      units.back().params.push_back({cat(unit, ".w", numel), {numel}, dtype});
      units.back().params.push_back({cat(unit, ".f", numel), {numel}, dtype, false});
    }
  }
  return plan::make_layout(std::move(units), mesh);
}

std::vector<optim::OptimizerOptions> all_optimizers() {
  using optim::OptimizerKind;
  optim::OptimizerOptions bf16_state{.kind = OptimizerKind::kAnyPrecisionAdamW};
  bf16_state.variance_dtype = DType::kBF16;
  bf16_state.use_kahan_summation = true;
  return {{},
          {.kind = OptimizerKind::kSgd},
          {.kind = OptimizerKind::kSgd, .momentum = 0.9},
          {.kind = OptimizerKind::kAnyPrecisionAdamW},
          bf16_state,
          {.kind = OptimizerKind::kAdamW8bit, .min_8bit_size = 1024},
          {.kind = OptimizerKind::kAdamW8bit}};
}

int64_t state_bytes_of(Executor& executor) {
  int64_t bytes = 0;
  for (size_t b = 0; b < executor.layout().buckets.size(); ++b) {
    if (!executor.layout().buckets[b].trainable) continue;
    for (const auto& tensor : executor.optimizer(static_cast<int>(b)).state_tensors())
      bytes += static_cast<int64_t>((tensor.values.size() + 63) / 64 * 64);  // Each is aligned.
  }
  return bytes;
}

TEST(Executor, TakesTheMemoryThatThePlanSaysWithEveryOptimizerAndPrecision) {
  const std::pair<DType, MasterPrecision> precisions[] = {{DType::kF32, MasterPrecision::kSplit},
                                                          {DType::kBF16, MasterPrecision::kSplit},
                                                          {DType::kBF16, MasterPrecision::kF32},
                                                          {DType::kBF16, MasterPrecision::kNone},
                                                          {DType::kF16, MasterPrecision::kSplit}};
  for (const int ranks : {1, 2, 3}) {
    for (const auto& [dtype, master] : precisions) {
      for (const optim::OptimizerOptions& optimizer : all_optimizers()) {
        SCOPED_TRACE(cat(ranks, " ranks, ", dtype_name(dtype), ", master ",
                         static_cast<int>(master), ", optimizer ",
                         static_cast<int>(optimizer.kind)));
        testing::run_ranks(ranks, [&, dtype = dtype, master = master](comm::Communicator& own) {
          const plan::Placement placement =
              plan::place(plan::Strategy::kFullShard, {.ranks = own.size(), .units = 2},
                          {.force_slot_home = true});
          const plan::Layout layout = layout_of_sizes(placement.mesh, dtype);
          Executor executor(
              layout, placement, std::shared_ptr<comm::Communicator>(&own, [](auto*) {}),
              {.master = master, .optimizer = optimizer, .groups = {{.name = "all"}}});
          const plan::MemoryPlan planned = plan::plan_memory(
              layout, placement,
              {.master = [&](const plan::Bucket& b) { return master_bytes(b, master); },
               .optimizer = optimizer_bytes(layout, optimizer)});
          executor.storage().keep_sums_apart();
          EXPECT_EQ(executor.storage().allocated_bytes() + planned.optimizer_state,
                    planned.total());
          const int64_t most = own.maximum(state_bytes_of(executor), "optimizer state");
          EXPECT_EQ(most, planned.optimizer_state);
        });
      }
    }
  }
}

}  // namespace
}  // namespace fsdp::engine
