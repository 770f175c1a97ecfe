// Orders of calls that are no plain chain: units inside units, called again, several calls of the
// model before a backward, orders that change. Each against the same modules trained without
// sharding.

#include <gtest/gtest.h>
#include <torch/nn/modules/container/modulelist.h>

#include <map>
#include <mutex>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/sharded.h"
#include "tests/ranks/residual_net.h"
#include "tests/ranks/training_run.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

constexpr int kWidth = 8;
constexpr int kTrainSteps = 4;
constexpr double kSgdRate = 5e-4;

// A unit with two units inside, and layers of its own before, between and after them.
struct OuterImpl : torch::nn::Module {
  OuterImpl()
      : first(kWidth, 12), second(kWidth, 12), before(kWidth, kWidth), after(kWidth, kWidth) {
    register_module("first", first);
    register_module("second", second);
    register_module("before", before);
    register_module("after", after);
  }
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor y = second->forward(at::tanh(before(first->forward(at::tanh(before(x))))));
    return after(y) + x;
  }
  Unit<ResidualBlock> first, second;
  torch::nn::Linear before, after;
};
TORCH_MODULE(Outer);

// A unit that holds a unit that holds units.
struct DeepImpl : torch::nn::Module {
  DeepImpl() : outer(), plain(kWidth, 12), scale(kWidth, kWidth) {
    register_module("outer", outer);
    register_module("plain", plain);
    register_module("scale", scale);
  }
  at::Tensor forward(const at::Tensor& x) {
    return scale(plain->forward(outer->forward(x)) + plain->forward(x));
  }
  Unit<Outer> outer;
  Unit<ResidualBlock> plain;
  torch::nn::Linear scale;
};
TORCH_MODULE(Deep);

enum class Pattern { kNested, kDeep, kTwice, kShared, kTwoModelCalls, kChanging, kNoGradInside };

struct ZooImpl : torch::nn::Module {
  ZooImpl() : a(kWidth, 12), b(kWidth, 16), c(kWidth, 12), outer(), deep(), head(kWidth, 5) {
    register_module("a", a);
    register_module("b", b);
    register_module("c", c);
    register_module("outer", outer);
    register_module("deep", deep);
    register_module("head", head);
  }
  at::Tensor features(at::Tensor x, Pattern pattern, int step) {
    switch (pattern) {
      case Pattern::kNested:
        return c->forward(outer->forward(a->forward(x)));
      case Pattern::kDeep:
        return b->forward(deep->forward(a->forward(x)));
      case Pattern::kTwice:  // The same units again and again, one after the other and at once.
        for (int i = 0; i < 3; ++i) x = b->forward(a->forward(x));
        return a->forward(x) + a->forward(2 * x);
      case Pattern::kShared:
        return outer->first->forward(outer->forward(outer->first->forward(x)));
      case Pattern::kTwoModelCalls:
        return b->forward(a->forward(x));
      case Pattern::kChanging:
        if (step == 2) return a->forward(c->forward(b->forward(x)));
        return step == 1 ? c->forward(a->forward(x)) : c->forward(b->forward(a->forward(x)));
      case Pattern::kNoGradInside: {
        at::Tensor target;
        {
          const at::NoGradGuard no_graph;
          target = b->forward(a->forward(x));
        }
        return a->forward(x) - target;
      }
    }
    return {};
  }
  at::Tensor loss(const at::Tensor& x, Pattern pattern, int step) {
    return head(features(x, pattern, step)).square().sum();
  }
  Unit<ResidualBlock> a, b, c;
  Unit<Outer> outer;
  Unit<Deep> deep;
  torch::nn::Linear head;
};
TORCH_MODULE(Zoo);

Zoo make_zoo() {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  torch::manual_seed(11);
  return Zoo();
}

at::Tensor input(int step, int m) {
  return at::sin(at::arange(3 * kWidth, at::kFloat).view({3, kWidth}) * (0.1 * (m + 1)) + step);
}

template <class Model>
at::Tensor loss_of(Model&& call, Pattern pattern, int step, int m) {
  at::Tensor loss = call(input(step, m), pattern, step);
  if (pattern == Pattern::kTwoModelCalls) loss = loss + call(input(step + 7, m), pattern, step);
  return loss;
}

// SGD on the sum of the losses of all micro-batches, divided by their number.
Trajectory train_plain_zoo(Pattern pattern, int micro_batches) {
  at::set_num_threads(1);
  Zoo zoo = make_zoo();
  Trajectory result;
  for (int step = 0; step < kTrainSteps; ++step) {
    double sum = 0;
    for (int m = 0; m < micro_batches; ++m) {
      const at::Tensor loss =
          loss_of([&](auto... arguments) { return zoo->loss(arguments...); }, pattern, step, m);
      loss.backward();
      sum += loss.item<double>();
    }
    result.losses.push_back(sum / micro_batches);
    const at::NoGradGuard no_graph;
    for (at::Tensor parameter : zoo->parameters()) {
      if (!parameter.grad().defined()) continue;
      parameter.sub_(parameter.grad(), kSgdRate / micro_batches);
      parameter.mutable_grad() = at::Tensor();
    }
  }
  for (const auto& entry : zoo->named_parameters()) {
    const at::Tensor flat = entry.value().detach().contiguous().view(-1);
    result.weights[entry.key()].assign(flat.data_ptr<float>(),
                                       flat.data_ptr<float>() + flat.numel());
  }
  return result;
}

Trajectory train_sharded_zoo(Pattern pattern, int ranks, int micro_batches,
                             const ShardOptions& options) {
  Trajectory result;
  run_ranks(ranks, [&](comm::Communicator& own) {
    auto sharded = fully_shard(make_zoo(), borrow(own), options);
    const auto call = [&](auto... arguments) {
      return sharded.run([&](auto& zoo) { return zoo.loss(arguments...); });
    };
    for (int step = 0; step < kTrainSteps; ++step) {
      Step open = sharded.begin_step(micro_batches / ranks);
      for (int m = own.rank(); m < micro_batches; m += ranks)
        open.backward(loss_of(call, pattern, step, m), 1);
      const StepStats stats = open.finish({.learning_rate = kSgdRate});
      if (own.rank() == 0) result.losses.push_back(stats.loss);
    }
    collect_weights(sharded.core(), result);
  });
  return result;
}

void expect_near(const Trajectory& got, const Trajectory& truth) {
  ASSERT_EQ(got.losses.size(), truth.losses.size());
  for (size_t i = 0; i < truth.losses.size(); ++i)
    EXPECT_NEAR(got.losses[i], truth.losses[i], 1e-6 * std::abs(truth.losses[i])) << "step " << i;
  for (const auto& [name, expected] : truth.weights) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      difference += std::pow(double{got.weights.at(name)[i]} - expected[i], 2);
      norm += std::pow(double{expected[i]}, 2);
    }
    EXPECT_LE(std::sqrt(difference), 5e-6 * std::sqrt(norm)) << name;
  }
}

class Calls : public ::testing::TestWithParam<Pattern> {};

TEST_P(Calls, TrainAsWithoutSharding) {
  constexpr int kAll = 4;  // Micro-batches.
  const Trajectory truth = train_plain_zoo(GetParam(), kAll);
  ShardOptions options = base_options();
  options.optimizer = {.kind = optim::OptimizerKind::kSgd};
  options.groups = {{.name = "all"}};
  options.verify_plans = true;
  for (const bool checkpointing : {false, true}) {
    for (const int slots : {0, 3, 6}) {
      for (const int ranks : {1, 2, 4}) {
        options.activation_checkpointing = checkpointing;
        options.placement.slots = slots;
        options.placement.kept_units = slots == 6 ? 2 : -1;
        SCOPED_TRACE(cat(ranks, " ranks, ", slots, " slots", checkpointing ? ", recompute" : ""));
        expect_near(train_sharded_zoo(GetParam(), ranks, kAll, options), truth);
      }
    }
    options.placement.force_slot_home = false;
    options.placement.slots = 0;
    options.placement.kept_units = -1;
    SCOPED_TRACE(cat("shared home", checkpointing ? ", recompute" : ""));
    expect_near(train_sharded_zoo(GetParam(), 2, kAll, options), truth);
    options.strategy = plan::Strategy::kHybridShard;
    options.placement.sharding_group_size = 2;
    expect_near(train_sharded_zoo(GetParam(), 4, kAll, options), truth);
    options.deterministic = false;
    options.placement.two_level = true;
    expect_near(train_sharded_zoo(GetParam(), 4, kAll, options), truth);
    for (const plan::Offload offload : {plan::Offload::kParameters, plan::Offload::kOptimizer}) {
      options.placement.offload = offload;
      SCOPED_TRACE("offloaded");
      expect_near(train_sharded_zoo(GetParam(), 4, kAll, options), truth);
    }
    options = base_options();
    options.optimizer = {.kind = optim::OptimizerKind::kSgd};
    options.groups = {{.name = "all"}};
    options.verify_plans = true;
  }
}

TEST_P(Calls, SumUnshardedGradientsToTheSame) {
  const Trajectory truth = train_plain_zoo(GetParam(), 4);
  ShardOptions options = base_options();
  options.deterministic = false;
  options.optimizer = {.kind = optim::OptimizerKind::kSgd};
  options.groups = {{.name = "all"}};
  options.placement.slots = 0;
  options.placement.accumulation = plan::Accumulation::kUnsharded;
  for (const int ranks : {1, 2})
    expect_near(train_sharded_zoo(GetParam(), ranks, 4, options), truth);
}

INSTANTIATE_TEST_SUITE_P(All, Calls,
                         ::testing::Values(Pattern::kNested, Pattern::kDeep, Pattern::kTwice,
                                           Pattern::kShared, Pattern::kTwoModelCalls,
                                           Pattern::kChanging, Pattern::kNoGradInside));

TEST(CallsTest, TooFewSlotsForUnitsInsideEachOtherNameTheMinimum) {
  ShardOptions options = base_options();
  options.placement.slots = 2;
  const std::string text = run_ranks_quietly(
      2, [&](comm::Communicator& own) { fully_shard(make_zoo(), borrow(own), options); });
  EXPECT_NE(text.find("need at least 3"), std::string::npos) << text;
}

}  // namespace
}  // namespace fsdp::testing
