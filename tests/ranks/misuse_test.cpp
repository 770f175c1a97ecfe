// What cannot work ends in an error that says what and where; evaluation between steps changes
// nothing.

#include <gtest/gtest.h>

#include <limits>
#include <mutex>

#include <torch/utils.h>

#include "libfsdp/base/error.h"
#include "tests/ranks/training_run.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

template <class Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

void expect_contains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "in: " << text;
}

using Net = Sharded<ResidualNet>;

at::Tensor loss_of(Net& net, int step, int m) {
  const MicroBatch batch = micro_batch(step, m);
  return net.run([&](auto& model) { return model.loss(batch.ids, batch.targets); });
}

TEST(Misuse, TouchingAParameterOutsideOfItsUnitNamesIt) {
  run_ranks(2, [](comm::Communicator& own) {
    Net net = fully_shard(make_net(), borrow(own), base_options());
    const std::string text = error_of([&] { net.module()->blocks[3]->up->weight.sum(); });
    expect_contains(text, "block3.up.weight");
    expect_contains(text, "not gathered");
  });
}

TEST(Misuse, CallingAUnitWithoutTheModelIsAnError) {
  run_ranks(1, [](comm::Communicator& own) {
    Net net = fully_shard(make_net(), borrow(own), base_options());
    expect_contains(error_of([&] {
                      net.module()->blocks[3]->forward(at::zeros({2, 24}));
                    }),
                    "outside of its sharded");
  });
}

TEST(Misuse, ABareBackwardIsAnError) {
  run_ranks(1, [](comm::Communicator& own) {
    Net net = fully_shard(make_net(), borrow(own), base_options());
    Step step = net.begin_step(1);
    const at::Tensor loss = loss_of(net, 0, 0);
    expect_contains(error_of([&] { loss.backward(); }), "Step::backward");
  });
}

TEST(Misuse, AForwardWithGradientsNeedsAStep) {
  run_ranks(1, [](comm::Communicator& own) {
    Net net = fully_shard(make_net(), borrow(own), base_options());
    expect_contains(error_of([&] { loss_of(net, 0, 0); }), "begin_step");
  });
}

TEST(Misuse, OrdersThatDifferBetweenRanksAreAnErrorThatNamesBoth) {
  for (const int first_different : {0, 1}) {
    std::mutex mutex;
    std::string texts;
    run_ranks(2, [&](comm::Communicator& own) {
      Net net = fully_shard(make_net(), borrow(own), base_options());
      for (int i = 0; i <= first_different; ++i) {
        Step step = net.begin_step(1);
        if (i == first_different && own.rank() == 1)
          std::swap(net.module()->blocks[2], net.module()->blocks[5]);
        const std::string text = error_of([&] {
          step.backward(loss_of(net, i, 0), 1);
          step.finish({.learning_rate = kRate});
        });
        const std::lock_guard lock(mutex);
        texts += text;
      }
    });
    expect_contains(texts, "began different collectives");
    expect_contains(texts, "rank 0 began gather of unit 'block");
    expect_contains(texts, "rank 1 began gather of unit 'block");
  }
}

TEST(Misuse, AnInPlaceWriteToAGatheredParameterIsFound) {
  run_ranks(1, [](comm::Communicator& own) {
    Net net = fully_shard(make_net(), borrow(own), base_options());
    const at::NoGradGuard no_graph;
    net.run([](auto& model) { return model.head->weight.zero_(); });
    expect_contains(error_of([&] { loss_of(net, 0, 0); }), "written in place");
  });
}

TEST(Misuse, NaNOnOneRankUpdatesNoRank) {
  Trajectory before, after;
  run_ranks(3, [&](comm::Communicator& own) {
    Net net = fully_shard(make_net(), borrow(own), base_options());
    collect_weights(net.core(), before);
    Step step = net.begin_step(1);
    const double factor = own.rank() == 1 ? std::numeric_limits<double>::quiet_NaN() : 1.0;
    step.backward(loss_of(net, 0, own.rank()) * factor, 5);
    expect_contains(error_of([&] { step.finish({.learning_rate = kRate}); }), "step 1");
    collect_weights(net.core(), after);
  });
  EXPECT_EQ(before.weights, after.weights);
}

TEST(Misuse, InfinityInAGradientUpdatesNoRank) {
  Trajectory before, after;
  run_ranks(2, [&](comm::Communicator& own) {
    Net net = fully_shard(make_net(), borrow(own), base_options());
    collect_weights(net.core(), before);
    Step step = net.begin_step(1);
    at::Tensor loss = loss_of(net, 0, own.rank());
    if (own.rank() == 1) {
      loss.register_hook([](const at::Tensor& gradient) {
        return gradient * std::numeric_limits<double>::infinity();
      });
    }
    step.backward(loss, 5);
    expect_contains(error_of([&] { step.finish({.learning_rate = kRate}); }), "not finite");
    collect_weights(net.core(), after);
  });
  EXPECT_EQ(before.weights, after.weights);
}

TEST(Misuse, MoreBackwardsThanAnnouncedAreRefused) {
  run_ranks(1, [](comm::Communicator& own) {
    Net net = fully_shard(make_net(), borrow(own), base_options());
    Step step = net.begin_step(1);
    step.backward(loss_of(net, 0, 0), 5);
    expect_contains(error_of([&] { loss_of(net, 0, 1); }), "announced only 1");
  });
}

// Rank 0 evaluates three batches between steps, rank 1 only one, rank 2 none: training must not
// notice.
TEST(Evaluation, BetweenStepsLeavesTrainingBitwiseAlone) {
  const Trajectory truth = train_sharded(3, 3, base_options());
  for (const auto strategy :
       {plan::Strategy::kFullShard, plan::Strategy::kShardGradOp, plan::Strategy::kNoShard}) {
    std::vector<double> losses, evaluated;
    run_ranks(3, [&](comm::Communicator& own) {
      ShardOptions options = base_options();
      options.strategy = strategy;
      Net net = fully_shard(make_net(), borrow(own), options);
      for (int s = 0; s < kSteps; ++s) {
        for (int i = 0; i < 3; ++i) {
          const at::NoGradGuard no_graph;
          const bool mine = own.rank() == 0 || (own.rank() == 1 && i == 0);
          if (!mine) {
            net.ghost_forward();
            continue;
          }
          const double loss = loss_of(net, s, 0).item<double>();
          if (own.rank() == 0 && i == 0) evaluated.push_back(loss);
        }
        Step step = net.begin_step(1);
        const at::Tensor loss = loss_of(net, s, own.rank());
        if (own.rank() == 0) {
          EXPECT_EQ(loss.item<double>(), evaluated.back());
        }
        step.backward(loss, micro_batch(s, own.rank()).ids.numel());
        const StepStats stats = step.finish({.learning_rate = kRate, .max_grad_norm = kMaxNorm});
        if (own.rank() == 0) losses.push_back(stats.loss);
      }
    });
    EXPECT_EQ(losses, truth.losses) << plan::strategy_name(strategy);
  }
}

// A unit that some micro-batches leave out, and a parameter that no rank uses.
struct ForkNetImpl : torch::nn::Module {
  ForkNetImpl() : a(8, 12), b(8, 12), unused(3, 3), head(8, 5) {
    register_module("a", a);
    register_module("b", b);
    register_module("unused", unused);
    register_module("head", head);
  }
  at::Tensor loss(const at::Tensor& x, bool with_b) {
    at::Tensor y = a->forward(x);
    if (with_b) y = b->forward(y);
    return head(y).square().sum();
  }
  Unit<ResidualBlock> a, b;
  torch::nn::Linear unused, head;
};
TORCH_MODULE(ForkNet);

TEST(UnusedParameters, AreNotUpdatedAndUnitsMayBeLeftOut) {
  torch::manual_seed(3);
  std::vector<float> before, after;
  double b_moved = 0;
  run_ranks(2, [&](comm::Communicator& own) {
    static std::mutex mutex;
    std::unique_lock lock(mutex);
    ForkNet model;
    lock.unlock();
    ShardOptions options = base_options();
    auto net = fully_shard(model, borrow(own), options);
    Trajectory start, end;
    collect_weights(net.core(), start);
    for (int s = 0; s < 3; ++s) {
      Step step = net.begin_step(2);
      for (const bool with_b : {true, false}) {
        step.backward(net.run([&](auto& m) { return m.loss(at::ones({2, 8}), with_b); }), 2);
      }
      step.finish({.learning_rate = 0.01});
    }
    collect_weights(net.core(), end);
    if (own.rank() != 0) return;
    // This rank's own elements are enough: elements of the other rank are zero in both.
    EXPECT_EQ(start.weights.at("unused.weight"), end.weights.at("unused.weight"));
    b_moved = std::abs(end.weights.at("b.norm.weight")[0] - start.weights.at("b.norm.weight")[0]);
  });
  EXPECT_GT(b_moved, 0.001);
}

}  // namespace
}  // namespace fsdp::testing
