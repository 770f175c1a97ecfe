// Adapters of LibTorch's own layers: against the same model of fsdp's layers, bit for bit, and
// against plain formulas.

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <filesystem>
#include <mutex>

#include "libfsdp/base/error.h"
#include "libfsdp/io/safetensors.h"
#include "libfsdp/lora/adapters.h"
#include "libfsdp/lora/peft_files.h"
#include "libfsdp/lora/quantized.h"
#include "libfsdp/lora/trainable.h"
#include "libfsdp/shard/functions.h"
#include "libfsdp/shard/init.h"
#include "libfsdp/shard/state.h"
#include "tests/ranks/plain_training.h"
#include "tests/ranks/training_run.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

namespace fs = std::filesystem;
namespace nn = torch::nn;
using at::Tensor;
using lora::Adapters;
using lora::LoraConfig;

constexpr int64_t kWidth = 12;
constexpr int64_t kRows = 23;
constexpr int kLayerSteps = 8;
constexpr double kLayerRate = 3e-3;

LoraConfig config_of(std::vector<std::string> targets) {
  LoraConfig config;
  config.r = 4;
  config.alpha = 6;
  config.target_modules = std::move(targets);
  return config;
}

ShardOptions layer_options() {
  ShardOptions options = base_options();
  options.groups = {{.name = "all", .weight_decay = 0}};
  options.param_group = nullptr;
  options.verify_plans = true;
  return options;
}

// ---------------------------------------------------------------------------------------------------------------------
// Twins

struct OwnLinearImpl : nn::Module, lora::Target {
  explicit OwnLinearImpl(const nn::LinearOptions& options) {
    weight =
        register_parameter("weight", at::zeros({options.out_features(), options.in_features()}));
    if (options.bias()) bias = register_parameter("bias", at::zeros({options.out_features()}));
  }
  Tensor forward(const Tensor& x) { return fsdp::linear(x, weight, bias); }
  lora::TargetKind target_kind() const override { return lora::TargetKind::kLinear; }
  const Tensor& target_weight() const override { return weight; }
  Tensor weight, bias;
};
TORCH_MODULE(OwnLinear);

struct OwnTableImpl : nn::Module, lora::Target {
  OwnTableImpl(int64_t rows, int64_t features) {
    weight = register_parameter("weight", at::zeros({rows, features}));
  }
  Tensor forward(const Tensor& ids) { return fsdp::embedding(weight, ids); }
  lora::TargetKind target_kind() const override { return lora::TargetKind::kEmbedding; }
  const Tensor& target_weight() const override { return weight; }
  Tensor weight;
};
TORCH_MODULE(OwnTable);

template <class Linear>
struct TwinBlockImpl : nn::Module {
  TwinBlockImpl()
      : up(nn::LinearOptions(kWidth, 2 * kWidth)),
        down(nn::LinearOptions(2 * kWidth, kWidth).bias(false)) {
    register_module("up", up);
    register_module("down", down);
  }
  // With two dimensions and a bias, with three and none.
  Tensor forward(const Tensor& x) { return x + down(at::gelu(up(x)).unsqueeze(0)).squeeze(0); }
  Linear up, down;
};
template <class Linear>
struct TwinBlock : nn::ModuleHolder<TwinBlockImpl<Linear>> {
  using nn::ModuleHolder<TwinBlockImpl<Linear>>::ModuleHolder;
};

template <class Linear, class Table>
struct TwinNetImpl : nn::Module {
  TwinNetImpl() : table(kRows, kWidth), head(nn::LinearOptions(kWidth, kRows).bias(false)) {
    register_module("table", table);
    for (int i = 0; i < 3; ++i) {
      blocks.emplace_back();
      register_module(cat("block", i), blocks.back().ptr());
    }
    register_module("head", head);
  }
  Tensor loss(const MicroBatch& batch) {
    Tensor x = table(batch.ids.remainder(kRows));
    for (auto& block : blocks) x = block->forward(x);
    return at::cross_entropy_loss(head(x), batch.targets.remainder(kRows), {}, at::Reduction::Sum);
  }
  Table table;
  std::vector<Unit<TwinBlock<Linear>>> blocks;
  Linear head;
};
template <class Linear, class Table>
struct TwinNet : nn::ModuleHolder<TwinNetImpl<Linear, Table>> {
  using nn::ModuleHolder<TwinNetImpl<Linear, Table>>::ModuleHolder;
};
using OwnNet = TwinNet<OwnLinear, OwnTable>;
using StockNet = TwinNet<nn::Linear, nn::Embedding>;

using Values = std::map<std::string, Tensor>;

struct LayerRun {
  std::vector<double> losses;
  Values start, end;
};

Values values_of(ShardedCore& core) {
  Values values;
  for (const ParameterInfo& info : core.parameters())
    if (info.trainable) values[info.name] = full_parameter(core, info.name);
  return values;
}

struct How {
  LoraConfig config;
  ShardOptions options = layer_options();
  std::string quantize_from;  // A folder with the base.
  bool second_adapter = false;
};

template <class Net>
LayerRun train_layers(int ranks, const How& how) {
  LayerRun result;
  run_ranks(ranks, [&](comm::Communicator& own) {
    Net net;
    Adapters adapters(*net, how.config);
    if (how.second_adapter) {
      adapters.add(config_of({"down", "head"}), "second");
      adapters.activate({"default", "second"});
    }
    std::optional<lora::QuantizedWeights> quantized;
    if (!how.quantize_from.empty())
      quantized.emplace(*net, lora::QuantizationOptions{.skip_modules = {"head"}});
    auto sharded = fully_shard(net, borrow(own), adapters.shard_options(how.options));
    if (quantized) {
      const auto files = io::HfWeights::open(how.quantize_from);
      load_weights(sharded.core(), files, quantized->file_names(), quantized->left_out());
      quantized->load(sharded.core(), files);
    } else {
      sharded.initialize(init::normal(3, 0.2));
    }
    for (const std::string& name : adapters.names()) adapters.initialize(sharded.core(), 4, name);
    Values start = values_of(sharded.core());
    std::vector<double> losses;
    for (int step = 0; step < kLayerSteps; ++step) {
      Step open = sharded.begin_step(kAllMicroBatches / ranks);
      for (int m = own.rank(); m < kAllMicroBatches; m += ranks) {
        const MicroBatch batch = micro_batch(step, m);
        open.backward(sharded.run([&](auto& model) { return model.loss(batch); }),
                      batch.ids.numel());
      }
      losses.push_back(open.finish({.learning_rate = kLayerRate}).loss);
    }
    Values end = values_of(sharded.core());
    if (own.rank() == 0) result = {losses, std::move(start), std::move(end)};
  });
  return result;
}

void expect_equal(const LayerRun& got, const LayerRun& truth) {
  EXPECT_EQ(got.losses, truth.losses);
  ASSERT_EQ(got.end.size(), truth.end.size());
  for (const auto& [name, value] : truth.end)
    EXPECT_TRUE(at::equal(got.end.at(name), value)) << name;
}

TEST(LoraLayers, StockLayersComputeTheBitsOfFsdpsOwn) {
  const std::vector<std::string> linears = {"up", "down", "head"};
  std::vector<How> ways;
  ways.push_back({.config = config_of(linears)});
  ways.push_back({.config = config_of(linears)});
  ways.back().options.activation_checkpointing = true;
  ways.push_back({.config = config_of(linears)});
  ways.back().config.dropout = 0.2;
  ways.back().config.bias = lora::BiasMode::kAll;
  ways.push_back({.config = config_of(linears)});
  ways.back().config.use_dora = true;
  ways.push_back({.config = config_of({"table", "up"})});
  ways.back().config.modules_to_save = {"head"};
  ways.push_back({.config = config_of({"table", "down"})});
  ways.back().config.use_dora = true;
  ways.push_back({.config = config_of(linears), .second_adapter = true});
  for (const How& how : ways) {
    SCOPED_TRACE(cat("way ", &how - ways.data()));
    const LayerRun truth = train_layers<OwnNet>(1, how);
    EXPECT_LT(truth.losses.back(), truth.losses.front());
    expect_equal(train_layers<StockNet>(2, how), truth);
  }
}

TEST(LoraLayers, QuantizedStockLayersComputeTheBitsOfFsdpsOwn) {
  const fs::path folder = fs::temp_directory_path() / cat("lora_layers_", getpid());
  fs::create_directories(folder);
  torch::manual_seed(3);
  OwnNet base;
  std::vector<io::TensorSpec> specs;
  std::vector<std::span<const std::byte>> data;
  for (auto& parameter : base->named_parameters()) {
    const at::NoGradGuard no_graph;
    parameter.value().copy_(at::randn(parameter.value().sizes()) * 0.2);
    specs.push_back({parameter.key(), DType::kF32, parameter.value().sizes().vec()});
    data.push_back({static_cast<const std::byte*>(parameter.value().data_ptr()),
                    static_cast<size_t>(parameter.value().nbytes())});
  }
  io::write_safetensors((folder / "model.safetensors").string(), specs, data);
  How how{.config = config_of({"up", "head"}), .quantize_from = folder.string()};
  const LayerRun truth = train_layers<OwnNet>(1, how);
  for (const int ranks : {1, 2}) {
    how.options.placement.force_slot_home = ranks == 2;
    how.options.activation_checkpointing = ranks == 2;
    expect_equal(train_layers<StockNet>(ranks, how), truth);
  }
  fs::remove_all(folder);
}

// ---------------------------------------------------------------------------------------------------------------------
// Convolutions

struct ConvBlockImpl : nn::Module {
  ConvBlockImpl()
      : line(nn::Conv1dOptions(kWidth, kWidth, 3).padding(1)),
        grouped(nn::Conv1dOptions(kWidth, 8, 3).padding(2).dilation(2).groups(2)),
        plane(nn::Conv2dOptions(1, 2, {3, 3}).padding(torch::kSame).bias(false)),
        space(nn::Conv3dOptions(1, 2, 2).stride(2).padding(1)) {
    register_module("line", line);
    register_module("grouped", grouped);
    register_module("plane", plane);
    register_module("space", space);
  }
  Tensor forward(const Tensor& x) {
    const Tensor sequence = x.t().unsqueeze(0);
    const Tensor a = at::tanh(line(sequence)).squeeze(0).t();
    const Tensor b = at::tanh(grouped(sequence)).mean(1).t();
    const Tensor c = at::tanh(plane(x.view({-1, 1, 3, 4}))).sum(1).view({-1, kWidth});
    const Tensor d = at::tanh(space(x.view({-1, 1, 2, 2, 3}))).flatten(1).mean(1, true);
    return x + a + b + c + d;
  }
  nn::Conv1d line, grouped;
  nn::Conv2d plane;
  nn::Conv3d space;
};
TORCH_MODULE(ConvBlock);

struct ConvNetImpl : nn::Module {
  ConvNetImpl() : table(nn::EmbeddingOptions(kRows, kWidth).padding_idx(2)), head(kWidth, kRows) {
    register_module("table", table);
    register_module("first", first);
    register_module("second", second);
    register_module("head", head);
  }
  Tensor loss(const MicroBatch& batch) {
    const Tensor x = second->forward(first->forward(table(batch.ids.remainder(kRows))));
    return at::cross_entropy_loss(head(x), batch.targets.remainder(kRows), {}, at::Reduction::Sum);
  }
  nn::Embedding table;
  Unit<ConvBlock> first, second;
  nn::Linear head;
};
TORCH_MODULE(ConvNet);

// The same with leaves for the adapters, and weights put together as the papers have it.
class PlainConvNet {
 public:
  PlainConvNet(const LoraConfig& config, const Values& weights) : config_(config) {
    for (const auto& [name, value] : weights) values_[name] = value.clone();
    for (auto& [name, value] : values_)
      if (Adapters::is_adapter(name)) value.set_requires_grad(true);
  }

  std::vector<double> train() {
    std::vector<Tensor> leaves;
    for (auto& [name, value] : values_)
      if (value.requires_grad()) leaves.push_back(value);
    return train_plain(leaves, kLayerSteps, kLayerRate,
                       [this](const MicroBatch& batch) { return loss_of(batch); });
  }

 private:
  Tensor weight(const std::string& module) const {
    const Tensor base = values_.at(module + ".weight");
    const auto a = values_.find(module + ".lora_A.default.weight");
    if (a == values_.end()) return base;
    const Tensor& b = values_.at(module + ".lora_B.default.weight");
    const Tensor sum = base + config_.scaling_of(module) *
                                  at::mm(b.flatten(1), a->second.flatten(1)).view_as(base);
    const auto magnitude = values_.find(module + ".lora_magnitude_vector.default.weight");
    if (magnitude == values_.end()) return sum;
    std::vector<int64_t> outputs(static_cast<size_t>(base.dim()), 1);
    outputs[0] = base.size(0);
    const Tensor norms = sum.flatten(1).norm(2, {1}).detach();
    return sum * (magnitude->second.flatten() / norms).view(outputs);
  }
  Tensor bias(const std::string& module) const { return values_.at(module + ".bias"); }

  Tensor grouped(const std::string& module, const Tensor& x) const {
    Tensor y = at::conv1d(x, values_.at(module + ".weight"), bias(module), 1, 2, 2, 2);
    const auto a = values_.find(module + ".lora_A.default.weight");
    if (a == values_.end()) return y;
    const Tensor t = at::conv1d(x, a->second, {}, 1, 2, 2);
    // Each half of the outputs sees its half of the rank.
    const Tensor b = values_.at(module + ".lora_B.default.weight").squeeze(2);
    const auto halves = t.chunk(2, 1);
    const Tensor add = at::cat(
        {at::matmul(b.narrow(0, 0, 4), halves[0]), at::matmul(b.narrow(0, 4, 4), halves[1])}, 1);
    return y + config_.scaling_of(module) * add;
  }

  Tensor block(const std::string& name, const Tensor& x) const {
    const Tensor sequence = x.t().unsqueeze(0);
    const Tensor a = at::conv1d(sequence, weight(name + ".line"), bias(name + ".line"), 1, 1);
    const Tensor c = at::conv2d(x.view({-1, 1, 3, 4}), weight(name + ".plane"), {}, 1, 1);
    const Tensor d =
        at::conv3d(x.view({-1, 1, 2, 2, 3}), weight(name + ".space"), bias(name + ".space"), 2, 1);
    return x + at::tanh(a).squeeze(0).t() +
           at::tanh(grouped(name + ".grouped", sequence)).mean(1).t() +
           at::tanh(c).sum(1).view({-1, kWidth}) + at::tanh(d).flatten(1).mean(1, true);
  }

  Tensor loss_of(const MicroBatch& batch) const {
    const Tensor ids = batch.ids.remainder(kRows);
    Tensor x = values_.at("table.weight").index_select(0, ids);
    if (const auto a = values_.find("table.lora_embedding_A.default"); a != values_.end()) {
      const Tensor rows = at::embedding(a->second.t(), ids, /*padding_idx=*/2);
      x = x + config_.scaling_of("table") *
                  at::matmul(rows, values_.at("table.lora_embedding_B.default").t());
    }
    x = block("second", block("first", x));
    return at::cross_entropy_loss(at::linear(x, weight("head"), bias("head")),
                                  batch.targets.remainder(kRows), {}, at::Reduction::Sum);
  }

  LoraConfig config_;
  Values values_;
};

// All parameters as train_layers starts with them.
Values conv_start(const How& how) {
  Values values;
  run_ranks(1, [&](comm::Communicator& own) {
    ConvNet net;
    Adapters adapters(*net, how.config);
    auto sharded = fully_shard(net, borrow(own), adapters.shard_options(how.options));
    sharded.initialize(init::normal(3, 0.2));
    adapters.initialize(sharded.core(), 4);
    for (const ParameterInfo& info : sharded.core().parameters())
      values[info.name] = full_parameter(sharded.core(), info.name);
  });
  return values;
}

TEST(LoraLayers, ConvolutionsTrainAsThePlainFormulas) {
  LoraConfig dora = config_of({"line", "plane", "space", "head"});
  dora.use_dora = true;
  LoraConfig part = config_of({"grouped", "space"});
  part.use_rslora = true;
  for (const LoraConfig& config :
       {config_of({"table", "line", "grouped", "plane", "space", "head"}), part, dora}) {
    How how{.config = config};
    for (const bool recompute : {false, true}) {
      how.options.activation_checkpointing = recompute;
      SCOPED_TRACE(cat(config.target_modules.size(), " targets", recompute ? ", recompute" : ""));
      const std::vector<double> truth = PlainConvNet(config, conv_start(how)).train();
      const LayerRun got = train_layers<ConvNet>(2, how);
      EXPECT_LT(truth.back(), truth.front());
      for (size_t i = 0; i < truth.size(); ++i)
        EXPECT_NEAR(got.losses[i], truth[i], 2e-6 * truth[i]) << "step " << i;
    }
  }
}

TEST(LoraLayers, NoStrategyNorNumberOfRanksChangesABit) {
  How how{.config = config_of({"table", "line", "grouped", "plane", "space", "head"})};
  how.config.dropout = 0.2;
  const LayerRun truth = train_layers<ConvNet>(1, how);
  for (const plan::Strategy strategy : {plan::Strategy::kFullShard, plan::Strategy::kShardGradOp,
                                        plan::Strategy::kHybridShard, plan::Strategy::kNoShard}) {
    for (const int ranks : {2, 4}) {
      for (const int way : {0, 1, 2}) {
        how.options = layer_options();
        how.options.strategy = strategy;
        how.options.placement = {
            .sharding_group_size = strategy == plan::Strategy::kHybridShard ? 2 : 0,
            .force_slot_home = way == 1,
            .offload = way == 2 ? plan::Offload::kParameters : plan::Offload::kNone};
        how.options.activation_checkpointing = way == 1;
        SCOPED_TRACE(cat(plan::strategy_name(strategy), " on ", ranks, ", ", way));
        expect_equal(train_layers<ConvNet>(ranks, how), truth);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Other operations on such a weight

// All of a foreign model as one unit, with a weight that it reads in its own ways.
struct ForeignImpl : nn::Module {
  ForeignImpl() : layer(nn::LinearOptions(kWidth, kWidth).bias(false)) {
    register_module("layer", layer);
  }
  Tensor forward(const Tensor& x, int64_t way) {
    const Tensor& weight = layer->weight;
    if (way == 0) return layer(x);
    if (way == 1) return at::mm(weight, x.t()).t();
    if (way == 2) return at::einsum("ij,nj->ni", {weight, x});
    if (way == 3) return at::addmm(x * 0, x, weight.t());
    return at::mm(x, weight.detach().t());  // A copy: the base alone.
  }
  nn::Linear layer;
};
TORCH_MODULE(Foreign);
struct ForeignNetImpl : nn::Module {
  ForeignNetImpl() { register_module("foreign", foreign); }
  Tensor forward(const Tensor& x, int64_t way) { return foreign->forward(x, way); }
  Unit<Foreign> foreign;
};
TORCH_MODULE(ForeignNet);

TEST(LoraLayers, OtherOperationsReadTheWeightAsTheAdapterMakesIt) {
  LoraConfig dora = config_of({"layer"});
  dora.use_dora = true;
  for (const LoraConfig& config : {config_of({"layer"}), dora}) {
    run_ranks(2, [&](comm::Communicator& own) {
      ForeignNet net;
      Adapters adapters(*net, config);
      auto sharded = fully_shard(net, borrow(own), adapters.shard_options(layer_options()));
      sharded.initialize(init::normal(3, 0.5));  // The adapter, too.
      const Tensor x = at::linspace(-1, 1, 3 * kWidth).view({3, kWidth});
      Values gradients;
      for (const int64_t way : {0, 1, 2, 3}) {
        Step open = sharded.begin_step(1);
        const Tensor y = sharded(x, way);
        open.backward(y.square().sum(), 1);
        open.complete_gradients();
        for (const ParameterInfo& info : sharded.core().parameters()) {
          if (!info.trainable) continue;
          const Tensor gradient = full_gradient(sharded.core(), info.name);
          if (way == 0) gradients[info.name] = gradient.clone();
          EXPECT_TRUE(at::allclose(gradient, gradients[info.name], 1e-4, 1e-5))
              << info.name << " in way " << way;
        }
        open.finish({.learning_rate = 0});
      }
      const at::NoGradGuard no_graph;
      const Tensor base = full_parameter(sharded.core(), "foreign.layer.weight");
      EXPECT_TRUE(at::allclose(sharded(x, 4), at::mm(x, base.t()), 1e-5, 1e-6));
      EXPECT_FALSE(at::allclose(sharded(x, 0), at::mm(x, base.t()), 1e-2, 1e-2));
      adapters.activate({});
      for (const int64_t way : {0, 1, 2, 3})
        EXPECT_TRUE(at::allclose(sharded(x, way), at::mm(x, base.t()), 1e-5, 1e-6)) << way;
    });
  }
}

TEST(LoraLayers, WhatCannotBeIsRefused) {
  const auto refusal = [](Foreign net, const LoraConfig& config) {
    try {
      Adapters adapters(*net, config);
      net->forward(at::ones({2, kWidth}), 1);
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  const auto expect = [](const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  LoraConfig config = config_of({"layer"});
  EXPECT_EQ(refusal(Foreign(), config), "");
  config.dropout = 0.1;
  expect(refusal(Foreign(), config), "'mm' reads the weight of 'layer', whose adapter has dropout");
  const auto conv_refusal = [](const nn::Conv2dOptions& options, const LoraConfig& one) {
    try {
      const auto net = std::make_shared<nn::Module>("net");
      net->register_module("0", nn::Conv2d(options));
      Adapters adapters(*net, one);
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  config = config_of({"0"});
  EXPECT_EQ(conv_refusal(nn::Conv2dOptions(4, 4, 3).groups(2), config), "");
  config.r = 3;
  expect(conv_refusal(nn::Conv2dOptions(4, 4, 3).groups(2), config), "no multiple of its 2 groups");
  config.init = lora::Init::kPissa;
  expect(conv_refusal(nn::Conv2dOptions(4, 4, 3), config), "first values of convolutions");
  config = config_of({"0"});
  expect(conv_refusal(nn::Conv2dOptions(4, 4, 3).padding(1).padding_mode(torch::kCircular), config),
         "does not pad with zeros");
  expect(conv_refusal(nn::Conv2dOptions(4, 4, 3).padding(torch::kSame).dilation(2), config),
         "without dilation");
  config.use_dora = true;
  expect(conv_refusal(nn::Conv2dOptions(4, 4, 3).groups(2), config), "use_dora with groups");
}

// ---------------------------------------------------------------------------------------------------------------------
// Parts that are frozen

// After `steps` steps; `end` holds all parameters, `start` those that are trained.
LayerRun train_part(int ranks, const lora::Names& frozen, bool recompute, int steps) {
  LayerRun result;
  run_ranks(ranks, [&](comm::Communicator& own) {
    StockNet net;
    lora::freeze(*net, frozen);
    ShardOptions options = layer_options();
    options.activation_checkpointing = recompute;
    auto sharded = fully_shard(net, borrow(own), options);
    sharded.initialize(init::normal(3, 0.2));
    Values start = values_of(sharded.core());
    for (int step = 0; step < steps; ++step) {
      Step open = sharded.begin_step(kAllMicroBatches / ranks);
      for (int m = own.rank(); m < kAllMicroBatches; m += ranks) {
        const MicroBatch batch = micro_batch(step, m);
        open.backward(sharded.run([&](auto& model) { return model.loss(batch); }),
                      batch.ids.numel());
      }
      open.finish({.learning_rate = kLayerRate});
    }
    Values end;
    for (const ParameterInfo& info : sharded.core().parameters())
      end[info.name] = full_parameter(sharded.core(), info.name);
    if (own.rank() == 0) result = {{}, std::move(start), std::move(end)};
  });
  return result;
}

// AdamW without clipping treats each parameter on its own, and in one step nobody sees what the
// others have become: so those that are trained become what they become when all are.
TEST(LoraLayers, FrozenPartsStayAndPassGradientsOn) {
  const LayerRun begin = train_part(1, {}, false, 0), all = train_part(1, {}, false, 1);
  const std::map<size_t, lora::Names> cases = {{8, {"block0"}},
                                               {4, {"table", "block0", "block1"}},
                                               {3, {"block1", "block[02].up.*", "head"}},
                                               {1, {"block\\d", "table"}}};
  for (const auto& [trained, frozen] : cases) {
    for (const bool recompute : {false, true}) {
      SCOPED_TRACE(cat(frozen[0], recompute ? ", recompute" : ""));
      const LayerRun got = train_part(2, frozen, recompute, 1);
      EXPECT_EQ(got.start.size(), trained);
      for (const auto& [name, value] : got.end) {
        const LayerRun& expected = got.start.count(name) != 0 ? all : begin;
        EXPECT_TRUE(at::equal(value, expected.end.at(name))) << name;
      }
    }
  }
  StockNet net;
  EXPECT_THROW(lora::freeze(*net, {"block7"}), ConfigError);
  EXPECT_THROW(lora::freeze_layers(*net, 1), ConfigError) << "it has no list of that name";
}

}  // namespace
}  // namespace fsdp::testing
