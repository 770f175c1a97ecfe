// LibTorch's own layers and odd parameters as units: each model of the zoo trains over ranks as it
// trains without them, with changing batch shapes and evaluations between the steps.

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/modules/rnn.h>
#include <torch/nn/modules/transformerlayer.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>
#include <torch/utils.h>

#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "libfsdp/base/error.h"
#include "tests/ranks/training_run.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

namespace nn = torch::nn;

constexpr int kZooSteps = 5;
constexpr int kMicroBatches = 4;
constexpr int kEvaluation = 100;  // A micro-batch that is never trained on.

// A model whose loss is a function of step and micro-batch, made of modules that it registers.
struct NetImpl : nn::Module {
  template <class Holder>
  auto add(const std::string& name, Holder holder) {
    return register_module(name, holder);
  }
  std::function<at::Tensor(int step, int m)> loss;
};
using Net = nn::ModuleHolder<NetImpl>;

// Numbers in [-1, 1], a function of (step, m).
at::Tensor numbers(at::IntArrayRef shape, int step, int m) {
  const int64_t n = c10::multiply_integers(shape);
  return at::sin(at::arange(n, at::kFloat) * (0.37 + 0.05 * m) + (1.3 * step + 0.7 * m))
      .view(shape);
}
int64_t rows(int step, int m) { return 2 + (step + m) % 3; }
int64_t terms(int step, int m) { return 3 + (2 * step + m) % 4; }
at::Tensor ids(at::IntArrayRef shape, int64_t end, int step, int m) {
  const int64_t n = c10::multiply_integers(shape);
  return (at::arange(n) * 7 + (step * 31 + m * 17)).remainder(end).view(shape);
}
// Away from zero, so that every output has a gradient.
at::Tensor loss_of(const at::Tensor& y) { return (y - 0.5).square().sum(); }

// Stock layers -----------------------------------------------------------------------------------

Net linear() {
  Net net;
  const auto a = net->add("a", Unit<nn::Linear>(5, 7)), b = net->add("b", Unit<nn::Linear>(7, 11)),
             c = net->add("c", Unit<nn::Linear>(nn::LinearOptions(11, 3).bias(false)));
  net->loss = [=](int s, int m) {
    return loss_of(c->forward(b->forward(a->forward(numbers({rows(s, m), 5}, s, m)).tanh())));
  };
  return net;
}

Net conv1d() {
  Net net;
  const auto a = net->add("a", Unit<nn::Conv1d>(nn::Conv1dOptions(3, 5, 3)));
  const auto b = net->add("b", Unit<nn::Conv1d>(nn::Conv1dOptions(5, 4, 2).padding(1)));
  net->loss = [=](int s, int m) {
    return loss_of(b->forward(a->forward(numbers({2, 3, 6 + rows(s, m)}, s, m)).tanh()));
  };
  return net;
}

Net conv2d_with_batch_norm() {
  Net net;
  const auto conv = net->add("conv", Unit<nn::Conv2d>(nn::Conv2dOptions(2, 4, 3).bias(false)));
  const auto norm = net->add("norm", Unit<nn::BatchNorm2d>(4));
  const auto head = net->add("head", Unit<nn::Conv2d>(nn::Conv2dOptions(4, 1, 2)));
  net->loss = [=](int s, int m) {
    const at::Tensor x = numbers({rows(s, m), 2, 5, 6}, s, m);
    return loss_of(head->forward(norm->forward(conv->forward(x)).tanh()));
  };
  return net;
}

Net embedding_and_norms() {
  Net net;
  const auto embed =
      net->add("embed", Unit<nn::Embedding>(nn::EmbeddingOptions(19, 6).padding_idx(3)));
  const auto layer = net->add("layer", Unit<nn::LayerNorm>(nn::LayerNormOptions({6})));
  const auto group = net->add("group", Unit<nn::GroupNorm>(nn::GroupNormOptions(3, 6)));
  net->loss = [=](int s, int m) {
    const at::Tensor x = layer->forward(embed->forward(ids({rows(s, m), 4}, 19, s, m)));
    return loss_of(group->forward(x.transpose(1, 2)));
  };
  return net;
}

Net lstm() {
  Net net;
  const auto layer =
      net->add("lstm", Unit<nn::LSTM>(nn::LSTMOptions(3, 5).num_layers(2).bidirectional(true)));
  const auto head = net->add("head", Unit<nn::Linear>(10, 2));
  net->loss = [=](int s, int m) {
    const auto [y, state] = layer->forward(numbers({4, rows(s, m), 3}, s, m), {});
    return loss_of(head->forward(y)) + std::get<1>(state).square().sum();
  };
  return net;
}

Net gru_with_state() {
  Net net;
  const auto first = net->add("first", Unit<nn::GRU>(nn::GRUOptions(3, 4).batch_first(true)));
  const auto second = net->add("second", Unit<nn::GRU>(nn::GRUOptions(4, 4).batch_first(true)));
  net->loss = [=](int s, int m) {
    const auto [x, state] = first->forward(numbers({rows(s, m), 3, 3}, s, m), {});
    return loss_of(std::get<0>(second->forward(x, state)));  // Gradients through both results.
  };
  return net;
}

Net encoder_layers() {
  Net net;
  const auto options =
      nn::TransformerEncoderLayerOptions(8, 2).dim_feedforward(12).dropout(0).activation(
          torch::kGELU);
  const auto a = net->add("a", Unit<nn::TransformerEncoderLayer>(options));
  const auto b = net->add("b", Unit<nn::TransformerEncoderLayer>(options));
  net->loss = [=](int s, int m) {
    const at::Tensor x = numbers({3, rows(s, m), 8}, s, m);
    const at::Tensor mask = at::full({3, 3}, -1e9).triu(1);
    return loss_of(b->forward(a->forward(x, mask, {}), {}, {}));
  };
  return net;
}

Net attention() {
  Net net;
  const auto self = net->add(
      "self", Unit<nn::MultiheadAttention>(nn::MultiheadAttentionOptions(6, 3).add_bias_kv(true)));
  const auto cross =
      net->add("cross", Unit<nn::MultiheadAttention>(
                            nn::MultiheadAttentionOptions(6, 2).kdim(5).vdim(5).bias(false)));
  net->loss = [=](int s, int m) {
    const at::Tensor x = numbers({3, rows(s, m), 6}, s, m);
    const at::Tensor y = std::get<0>(self->forward(x, x, x, {}, true, {}, true));
    const auto [z, weights] =
        cross->forward(y, numbers({4, rows(s, m), 5}, s + 1, m),
                       numbers({4, rows(s, m), 5}, s + 2, m), {}, true, {}, true);
    return loss_of(z) + weights.square().sum();
  };
  return net;
}

Net bilinear_and_prelu() {
  Net net;
  const auto mix = net->add("mix", Unit<nn::Bilinear>(3, 5, 4));
  const auto act = net->add("act", Unit<nn::PReLU>(nn::PReLUOptions().num_parameters(4)));
  net->loss = [=](int s, int m) {
    const int64_t n = rows(s, m);
    return loss_of(act->forward(mix->forward(numbers({n, 3}, s, m), numbers({n, 5}, m, s))));
  };
  return net;
}

Net sequential_of_units() {
  Net net;
  const auto all = net->add(
      "all", nn::Sequential(Unit<nn::Linear>(4, 6), nn::Tanh(), Unit<nn::Linear>(6, 6), nn::GELU(),
                            Unit<nn::LayerNorm>(nn::LayerNormOptions({6})), nn::Linear(6, 2)));
  net->loss = [=](int s, int m) { return loss_of(all->forward(numbers({rows(s, m), 4}, s, m))); };
  return net;
}

// Parameters in odd places -----------------------------------------------------------------------

struct PlainImpl : nn::Module {  // A foreign model, which knows nothing of units.
  PlainImpl() : embed(13, 6), rnn(6, 5), out(5, 3) {
    register_module("embed", embed);
    register_module("rnn", rnn);
    register_module("out", out);
  }
  at::Tensor forward(const at::Tensor& x) { return out(std::get<0>(rnn(embed(x)))); }
  nn::Embedding embed;
  nn::LSTM rnn;
  nn::Linear out;
};
TORCH_MODULE(Plain);

Net no_units() {
  Net net;
  const auto model = net->add("model", Plain());
  net->loss = [=](int s, int m) { return loss_of(model->forward(ids({3, rows(s, m)}, 13, s, m))); };
  return net;
}

Net foreign_model_as_one_unit() {
  Net net;
  const auto model = net->add("model", Unit<Plain>());
  net->loss = [=](int s, int m) { return loss_of(model->forward(ids({3, rows(s, m)}, 13, s, m))); };
  return net;
}

struct TiedInsideImpl : nn::Module {
  TiedInsideImpl() : a(5, 5) {
    register_module("a", a);
    again = register_parameter("again", a->weight);
  }
  at::Tensor forward(const at::Tensor& x) { return at::linear(at::tanh(a(x)), again) + x; }
  nn::Linear a;
  at::Tensor again;
};
TORCH_MODULE(TiedInside);

Net tied_inside_a_unit() {
  Net net;
  const auto a = net->add("a", Unit<TiedInside>());
  const auto b = net->add("b", Unit<TiedInside>());
  net->loss = [=](int s, int m) {
    return loss_of(b->forward(a->forward(numbers({rows(s, m), 5}, s, m))));
  };
  return net;
}

// A layer around a tensor that may be another layer's.
struct ProjectionImpl : nn::Module {
  explicit ProjectionImpl(const at::Tensor& tensor)
      : weight(register_parameter("weight", tensor)) {}
  at::Tensor forward(const at::Tensor& x) { return at::linear(x, weight); }
  at::Tensor weight;
};
TORCH_MODULE(Projection);

Net tied_across_units() {
  Net net;
  const auto embed = net->add("embed", Unit<nn::Embedding>(11, 6));
  const auto body = net->add("body", Unit<nn::Linear>(6, 6));
  const auto head = net->add("head", Unit<Projection>(embed->weight));
  net->loss = [=](int s, int m) {
    const at::Tensor x = at::tanh(body->forward(embed->forward(ids({rows(s, m)}, 11, s, m))));
    return loss_of(head->forward(x));
  };
  return net;
}

// Every other parameter of each block is frozen.
Net mixed_requires_grad() {
  Net net;
  const auto a = net->add("a", Unit<ResidualBlock>(6, 9));
  const auto b = net->add("b", Unit<ResidualBlock>(6, 10));
  a->up->weight.set_requires_grad(false);
  a->norm->bias.set_requires_grad(false);
  b->down->weight.set_requires_grad(false);
  net->loss = [=](int s, int m) {
    return loss_of(b->forward(a->forward(numbers({rows(s, m), 6}, s, m))));
  };
  return net;
}

Net frozen_first_and_middle_unit() {
  Net net;
  const auto embed = net->add("embed", Unit<nn::Embedding>(11, 6));
  const auto first = net->add("first", Unit<nn::Linear>(6, 6));
  const auto middle = net->add("middle", Unit<ResidualBlock>(6, 9));
  const auto last = net->add("last", Unit<nn::Linear>(6, 2));
  embed->weight.set_requires_grad(false);
  for (auto& parameter : middle->parameters()) parameter.set_requires_grad(false);
  net->loss = [=](int s, int m) {
    const at::Tensor x = first->forward(embed->forward(ids({rows(s, m)}, 11, s, m)));
    return loss_of(last->forward(middle->forward(x)));
  };
  return net;
}

// Scalars, an empty parameter, and fewer elements than ranks.
struct OddImpl : nn::Module {
  explicit OddImpl(double scale_value)
      : scale(register_parameter("scale", at::scalar_tensor(scale_value))),
        nothing(register_parameter("nothing", at::zeros({0, 3}))),
        shift(register_parameter("shift", at::full({1}, 0.25))) {}
  at::Tensor forward(const at::Tensor& x) { return x * scale + shift + nothing.sum(); }
  at::Tensor scale, nothing, shift;
};
TORCH_MODULE(Odd);

Net odd_parameters() {
  Net net;
  const auto a = net->add("a", Unit<Odd>(0.7)), b = net->add("b", Unit<Odd>(-1.2));
  const at::Tensor gain = net->register_parameter("gain", at::scalar_tensor(0.9));
  net->loss = [=](int s, int m) {
    return loss_of(gain * b->forward(at::tanh(a->forward(numbers({rows(s, m), 3}, s, m)))));
  };
  return net;
}

// Results that are views of parameters, parts that nobody uses, and changes in place.
struct ViewsImpl : nn::Module {
  ViewsImpl()
      : layer(4, 4), table(register_parameter("table", at::linspace(-1, 1, 12).view({3, 4}))) {
    register_module("layer", layer);
  }
  std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& x) {
    return {layer(x), table.select(0, 1), layer(x).tanh()};
  }
  nn::Linear layer;
  at::Tensor table;
};
TORCH_MODULE(Views);

Net views_and_unused_results() {
  Net net;
  const auto a = net->add("a", Unit<Views>()), b = net->add("b", Unit<Views>());
  net->loss = [=](int s, int m) {
    const auto [x, row, unused] = a->forward(numbers({rows(s, m), 4}, s, m));
    const auto [y, other_row, z] = b->forward(at::tanh(x * row));
    return loss_of(z) + other_row.square().sum();
  };
  return net;
}

Net changes_in_place() {
  Net net;
  const auto a = net->add("a", Unit<nn::Linear>(4, 5)), b = net->add("b", Unit<nn::Linear>(5, 3));
  net->loss = [=](int s, int m) {
    at::Tensor x = a->forward(numbers({rows(s, m), 4}, s, m));
    x.mul_(1.5).tanh_();
    return loss_of(b->forward(x));
  };
  return net;
}

// Training ---------------------------------------------------------------------------------------

struct ZooCase {
  const char* name;
  Net (*make)();
  /// Where some gradients are zero but for rounding, AdamW would make steps of them: SGD instead.
  bool sgd = false;
  /// Running statistics are each rank's own.
  bool has_statistics = false;
};
void PrintTo(const ZooCase& one, std::ostream* out) { *out << one.name; }

const std::vector<ZooCase>& zoo() {
  static const std::vector<ZooCase> cases = {
      {"Linear", linear},
      {"Conv1d", conv1d},
      {"Conv2dWithBatchNorm", conv2d_with_batch_norm, false, true},
      {"EmbeddingLayerNormGroupNorm", embedding_and_norms, true},
      {"LstmOfTwoLayersAndDirections", lstm},
      {"GruWithState", gru_with_state},
      {"TransformerEncoderLayers", encoder_layers, true},
      {"MultiheadAttention", attention, true},
      {"BilinearAndPRelu", bilinear_and_prelu},
      {"SequentialOfUnits", sequential_of_units},
      {"NoUnits", no_units},
      {"ForeignModelAsOneUnit", foreign_model_as_one_unit},
      {"TiedInsideAUnit", tied_inside_a_unit},
      {"TiedAcrossUnits", tied_across_units},
      {"MixedRequiresGrad", mixed_requires_grad},
      {"FrozenFirstAndMiddleUnit", frozen_first_and_middle_unit},
      {"OddParameters", odd_parameters},
      {"ViewsAndUnusedResults", views_and_unused_results},
      {"ChangesInPlace", changes_in_place},
  };
  return cases;
}

struct ZooRun {
  Trajectory training;
  std::vector<double> evaluations;  // After each step, on a batch of their own.
};

Net make(const ZooCase& one) {
  static std::mutex one_at_a_time;  // The default generator is shared by all threads.
  const std::lock_guard lock(one_at_a_time);
  torch::manual_seed(7);
  return one.make();
}

template <class Model>
double evaluate(nn::Module& module, int step, Model&& loss) {
  const at::NoGradGuard no_graph;
  module.eval();
  const double value = loss(step, kEvaluation).template item<double>();
  module.train();
  return value;
}

std::unique_ptr<torch::optim::Optimizer> stock_optimizer(const ZooCase& one,
                                                         std::vector<at::Tensor> parameters) {
  if (one.sgd) {
    return std::make_unique<torch::optim::SGD>(
        std::move(parameters), torch::optim::SGDOptions(kRate).momentum(0.9).weight_decay(0.01));
  }
  return std::make_unique<torch::optim::AdamW>(
      std::move(parameters), torch::optim::AdamWOptions(kRate).weight_decay(0.01));
}

ZooRun train_plainly(const ZooCase& one) {
  at::set_num_threads(1);
  Net net = make(one);
  std::vector<std::pair<std::string, at::Tensor>> named;  // A tied tensor once.
  std::vector<at::Tensor> trained;
  std::set<const void*> seen;
  for (const auto& entry : net->named_parameters()) {
    if (!seen.insert(entry.value().unsafeGetTensorImpl()).second) continue;
    named.emplace_back(entry.key(), entry.value());
    if (entry.value().requires_grad()) trained.push_back(entry.value());
  }
  const auto optimizer = stock_optimizer(one, trained);
  ZooRun run;
  for (int step = 0; step < kZooSteps; ++step) {
    double sum = 0, count = 0;
    for (int m = 0; m < kMicroBatches; ++m) {
      const at::Tensor loss = net->loss(step, m);
      loss.backward();
      sum += loss.item<double>();
      count += static_cast<double>(terms(step, m));
    }
    for (at::Tensor& parameter : trained) parameter.mutable_grad().div_(count);
    run.training.norms.push_back(nn::utils::clip_grad_norm_(trained, kMaxNorm));
    run.training.losses.push_back(sum / count);
    optimizer->step();
    optimizer->zero_grad();
    run.evaluations.push_back(evaluate(*net, step, net->loss));
  }
  for (const auto& [name, tensor] : named) {
    const at::Tensor flat = tensor.detach().contiguous().view(-1);
    run.training.weights[name].assign(flat.const_data_ptr<float>(),
                                      flat.const_data_ptr<float>() + flat.numel());
  }
  return run;
}

ZooRun train_over_ranks(const ZooCase& one, int ranks, ShardOptions options) {
  if (one.sgd) {
    options.optimizer.kind = optim::OptimizerKind::kSgd;
    options.optimizer.momentum = 0.9;
  }
  ZooRun run;
  run_ranks(ranks, [&](comm::Communicator& own) {
    const int rank = own.rank();
    auto sharded = fully_shard(make(one), borrow(own), options);
    const auto call = [&](int step, int m) {
      return sharded.run([&](auto& net) { return net.loss(step, m); });
    };
    for (int step = 0; step < kZooSteps; ++step) {
      const int mine = (kMicroBatches - rank + ranks - 1) / ranks;
      Step open = sharded.begin_step(mine);
      for (int a = 0; a < mine; ++a) {
        const int m = a * ranks + rank;
        open.backward(call(step, m), terms(step, m));
      }
      const StepStats stats = open.finish({.learning_rate = kRate, .max_grad_norm = kMaxNorm});
      const double evaluated = evaluate(*sharded.module(), step, call);
      if (rank != 0) continue;
      run.training.losses.push_back(stats.loss);
      run.training.norms.push_back(stats.grad_norm);
      run.evaluations.push_back(evaluated);
    }
    collect_weights(sharded.core(), run.training);
  });
  return run;
}

// Two correct orders of summation differ by some 1e-7 in these losses.
constexpr double kZooLoss = 1e-6;
constexpr double kZooWeights = 5e-6;

class ModuleZoo : public ::testing::TestWithParam<ZooCase> {};

TEST_P(ModuleZoo, TrainsAsWithoutRanks) {
  using enum plan::Strategy;
  const ZooCase& one = GetParam();
  const ZooRun truth = train_plainly(one);
  for (const auto strategy : {kFullShard, kShardGradOp, kHybridShard, kNoShard}) {
    for (const int ranks : {1, 2, 3, 4}) {
      if (strategy == kHybridShard && ranks != 4) continue;
      for (const bool checkpointing : {false, true}) {
        SCOPED_TRACE(cat(plan::strategy_name(strategy), " on ", ranks,
                         checkpointing ? ", recompute" : ", keep"));
        ShardOptions options = base_options();
        options.strategy = strategy;
        options.activation_checkpointing = checkpointing;
        if (strategy == kHybridShard) options.placement.sharding_group_size = 2;
        const ZooRun got = train_over_ranks(one, ranks, options);
        expect_close(got.training, truth.training, kZooLoss, kZooWeights);
        // Statistics are a rank's own, and recomputation takes them twice.
        if (one.has_statistics && (ranks > 1 || checkpointing)) continue;
        ASSERT_EQ(got.evaluations.size(), truth.evaluations.size());
        for (size_t i = 0; i < truth.evaluations.size(); ++i)
          EXPECT_NEAR(got.evaluations[i], truth.evaluations[i], 1e-5 * truth.evaluations[i]);
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, ModuleZoo, ::testing::ValuesIn(zoo()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace fsdp::testing
