// Adapters in sharded training, against the same formulas in plain LibTorch.

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <filesystem>
#include <mutex>
#include <set>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/fake.h"
#include "libfsdp/io/safetensors.h"
#include "libfsdp/lora/adapters.h"
#include "libfsdp/lora/merge.h"
#include "libfsdp/lora/peft_files.h"
#include "libfsdp/shard/functions.h"
#include "tests/ranks/plain_training.h"
#include "tests/ranks/training_run.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

using at::Tensor;
using lora::Adapters;
using lora::LoraConfig;

constexpr int kBlocks = 4;
constexpr int64_t kWidth = 12;
constexpr int64_t kRows = 23;
constexpr int kLoraSteps = 12;
constexpr double kLoraRate = 3e-3;

struct LayerImpl : torch::nn::Module, lora::Target {
  LayerImpl(int64_t in, int64_t out, bool with_bias) {
    weight = register_parameter("weight", at::randn({out, in}) / std::sqrt(double(in)));
    if (with_bias) bias = register_parameter("bias", at::randn({out}) * 0.1);
  }
  Tensor forward(const Tensor& x) { return fsdp::linear(x, weight, bias); }
  lora::TargetKind target_kind() const override { return lora::TargetKind::kLinear; }
  const Tensor& target_weight() const override { return weight; }
  Tensor weight, bias;
};
TORCH_MODULE(Layer);

struct TableImpl : torch::nn::Module, lora::Target {
  TableImpl() { weight = register_parameter("weight", at::randn({kRows, kWidth})); }
  Tensor forward(const Tensor& ids) { return fsdp::embedding(weight, ids); }
  lora::TargetKind target_kind() const override { return lora::TargetKind::kEmbedding; }
  const Tensor& target_weight() const override { return weight; }
  Tensor weight;
};
TORCH_MODULE(Table);

struct BlockImpl : torch::nn::Module {
  BlockImpl() : up(kWidth, 2 * kWidth, true), down(2 * kWidth, kWidth, false) {
    register_module("up", up);
    register_module("down", down);
  }
  Tensor forward(const Tensor& x) { return x + down(at::gelu(up(x))); }
  Layer up, down;
};
TORCH_MODULE(Block);

struct AdaptNetImpl : torch::nn::Module {
  AdaptNetImpl() : head(kWidth, kRows, false) {
    register_module("table", table);
    for (int i = 0; i < kBlocks; ++i) {
      blocks.emplace_back();
      register_module(cat("block", i), blocks.back());
    }
    register_module("lm_head", head);
  }
  Tensor loss(const MicroBatch& batch) {
    Tensor x = table(batch.ids.remainder(kRows));
    for (auto& block : blocks) x = block->forward(x);
    return at::cross_entropy_loss(head(x), batch.targets.remainder(kRows), {}, at::Reduction::Sum);
  }
  Table table;
  std::vector<Unit<Block>> blocks;
  Layer head;
};
TORCH_MODULE(AdaptNet);

AdaptNet make_adapt_net() {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  torch::manual_seed(8);
  return AdaptNet();
}

LoraConfig base_config() {
  LoraConfig config;
  config.r = 3;
  config.alpha = 6;
  config.target_modules = {"up", "down"};
  return config;
}

// ---------------------------------------------------------------------------------------------------------------------
// The truth: leaves and formulas.

// Parameters of adapters by their names, as training left them.
using Values = std::map<std::string, Tensor>;

class PlainRun {
 public:
  PlainRun(const LoraConfig& config, Values start) : config_(config), net_(make_adapt_net()) {
    for (auto& [name, value] : start) leaves_[name] = value.clone().set_requires_grad(true);
    for (auto& parameter : net_->parameters()) parameter.set_requires_grad(false);
  }

  std::vector<double> train() {
    std::vector<Tensor> leaves;
    for (auto& [name, leaf] : leaves_) leaves.push_back(leaf);
    return train_plain(leaves, kLoraSteps, kLoraRate,
                       [this](const MicroBatch& batch) { return loss_of(batch); });
  }

 private:
  Tensor linear(const std::string& module, const LayerImpl& layer, const Tensor& x) {
    const auto a = leaves_.find(module + ".lora_A.default.weight");
    if (a == leaves_.end()) return at::linear(x, layer.weight, some(layer.bias));
    const Tensor& b = leaves_.at(module + ".lora_B.default.weight");
    const double scaling = config_.scaling_of(module);
    const auto magnitude = leaves_.find(module + ".lora_magnitude_vector.default.weight");
    if (magnitude == leaves_.end())
      return at::linear(x, layer.weight, some(layer.bias)) +
             scaling * at::linear(at::linear(x, a->second), b);
    const Tensor whole = layer.weight + scaling * at::mm(b, a->second);
    const Tensor scale = magnitude->second / whole.norm(2, {1}).detach();
    return at::linear(x, whole * scale.unsqueeze(1), some(layer.bias));
  }
  static std::optional<Tensor> some(const Tensor& tensor) {
    return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
  }

  Tensor loss_of(const MicroBatch& batch) {
    const Tensor ids = batch.ids.remainder(kRows);
    Tensor x = net_->table->weight.index_select(0, ids);
    const auto a = leaves_.find("table.lora_embedding_A.default");
    if (a != leaves_.end()) {
      x = x +
          config_.scaling_of("table") * at::linear(a->second.t().index_select(0, ids),
                                                   leaves_.at("table.lora_embedding_B.default"));
    }
    for (int i = 0; i < kBlocks; ++i) {
      const auto& block = *net_->blocks[static_cast<size_t>(i)];
      const std::string name = cat("block", i);
      x = x + linear(name + ".down", *block.down, at::gelu(linear(name + ".up", *block.up, x)));
    }
    return at::cross_entropy_loss(linear("lm_head", *net_->head, x), batch.targets.remainder(kRows),
                                  {}, at::Reduction::Sum);
  }

  LoraConfig config_;
  AdaptNet net_;
  Values leaves_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Sharded

struct LoraRun {
  std::vector<double> losses;
  Values start, end;
};

Values values_of(ShardedCore& core) {
  Values values;
  for (const ParameterInfo& info : core.parameters())
    if (info.trainable) values[info.name] = full_parameter(core, info.name);
  return values;
}

LoraRun train_lora(int ranks, const LoraConfig& config, const ShardOptions& options) {
  LoraRun result;
  run_ranks(ranks, [&](comm::Communicator& own) {
    AdaptNet net = make_adapt_net();
    Adapters adapters(*net, config);
    auto sharded = fully_shard(net, borrow(own), adapters.shard_options(options));
    adapters.initialize(sharded.core(), 4);
    const Values start = values_of(sharded.core());
    std::vector<double> losses;
    for (int step = 0; step < kLoraSteps; ++step) {
      Step open = sharded.begin_step(kAllMicroBatches / ranks);
      for (int m = own.rank(); m < kAllMicroBatches; m += ranks) {
        const MicroBatch batch = micro_batch(step, m);
        open.backward(sharded.run([&](auto& model) { return model.loss(batch); }),
                      batch.ids.numel());
      }
      losses.push_back(open.finish({.learning_rate = kLoraRate}).loss);
    }
    Values end = values_of(sharded.core());
    if (own.rank() == 0) result = {losses, start, std::move(end)};
  });
  return result;
}

ShardOptions lora_options() {
  ShardOptions options = base_options();
  options.groups = {{.name = "all", .weight_decay = 0}};
  options.param_group = nullptr;
  options.verify_plans = true;
  return options;
}

void expect_near_plain(const LoraRun& got, const LoraConfig& config) {
  const std::vector<double> truth = PlainRun(config, got.start).train();
  ASSERT_EQ(got.losses.size(), truth.size());
  EXPECT_LT(truth.back(), truth.front());
  for (size_t i = 0; i < truth.size(); ++i)
    EXPECT_NEAR(got.losses[i], truth[i], 1e-6 * truth[i]) << "step " << i;
}

TEST(Lora, TrainsAsThePlainFormulas) {
  LoraConfig rslora = base_config();
  rslora.use_rslora = true;
  LoraConfig dora = base_config();
  dora.use_dora = true;
  LoraConfig all = base_config();
  all.target_modules = {"table", "up", "down", "lm_head"};
  all.rank_pattern = {{"block1.up", 5}};
  all.alpha_pattern = {{"down", 2}};
  for (const LoraConfig& config : {base_config(), rslora, dora, all}) {
    for (const bool recompute : {false, true}) {
      ShardOptions options = lora_options();
      options.activation_checkpointing = recompute;
      SCOPED_TRACE(cat("rslora ", config.use_rslora, ", dora ", config.use_dora, ", targets ",
                       config.target_modules.size(), recompute ? ", recompute" : ""));
      expect_near_plain(train_lora(2, config, options), config);
    }
  }
}

TEST(Lora, NoStrategyNorNumberOfRanksChangesABit) {
  LoraConfig config = base_config();
  config.dropout = 0.2;
  const LoraRun truth = train_lora(1, config, lora_options());
  for (const plan::Strategy strategy : {plan::Strategy::kFullShard, plan::Strategy::kShardGradOp,
                                        plan::Strategy::kHybridShard, plan::Strategy::kNoShard}) {
    for (const int ranks : {1, 2, 4}) {
      for (const int way : {0, 1, 2, 3}) {
        const bool hybrid = strategy == plan::Strategy::kHybridShard;
        if (hybrid && ranks == 1) continue;
        ShardOptions options = lora_options();
        options.strategy = strategy;
        options.placement = {
            .sharding_group_size = hybrid ? 2 : 0,
            .force_slot_home = way == 1,
            .offload = way == 2 ? plan::Offload::kParameters : plan::Offload::kNone};
        options.activation_checkpointing = way == 3;
        SCOPED_TRACE(cat(plan::strategy_name(strategy), " on ", ranks, ", ", way));
        const LoraRun got = train_lora(ranks, config, options);
        EXPECT_EQ(got.losses, truth.losses);
        for (const auto& [name, value] : truth.end)
          EXPECT_TRUE(at::equal(got.end.at(name), value)) << name;
      }
    }
  }
}

// A packed weight: bytes beside a parameter that learns.
struct PackedImpl : torch::nn::Module {
  PackedImpl() {
    bytes = register_parameter("bytes", at::arange(1000, at::kByte), /*requires_grad=*/false);
    scale = register_parameter("scale", at::ones({1}));
  }
  Tensor forward(const Tensor& x) { return x.to(at::kFloat) * scale * bytes.to(at::kFloat).sum(); }
  Tensor bytes, scale;
};
TORCH_MODULE(Packed);
struct PackedNetImpl : torch::nn::Module {
  PackedNetImpl() { register_module("packed", packed); }
  Tensor forward(const Tensor& x) { return packed(x); }
  Unit<Packed> packed;
};
TORCH_MODULE(PackedNet);

TEST(Lora, FrozenBytesAreShardedAndGatheredAsTheyAre) {
  for (const int ranks : {1, 2, 3}) {
    for (const bool slots : {false, true}) {
      run_ranks(ranks, [&](comm::Communicator& own) {
        ShardOptions options = lora_options();
        options.placement = {.force_slot_home = slots};
        options.param_dtype = DType::kBF16;
        auto sharded = fully_shard(PackedNet(), borrow(own), options);
        Step open = sharded.begin_step(1);
        const Tensor y = sharded(at::ones({1}));
        EXPECT_EQ(y.item<float>(), at::arange(1000, at::kByte).sum().item<float>());
        open.backward(y.sum(), 1);
        open.finish({.learning_rate = 0});
      });
    }
  }
}

// Adapters of all units are one bucket: one gather and one reduction a step, whatever the number of
// micro-batches, when there is room for the frozen units.
TEST(Lora, AStepCostsOneGatherAndOneReduction) {
  auto fake = std::make_shared<comm::FakeCommunicator>(0, 4, comm::FakeOptions{});
  ShardOptions options = lora_options();
  options.deterministic = false;
  options.poison = false;
  options.strategy = plan::Strategy::kShardGradOp;
  options.placement = {.force_slot_home = true, .accumulation = plan::Accumulation::kUnsharded};
  AdaptNet net = make_adapt_net();
  Adapters adapters(*net, base_config());
  auto sharded = fully_shard(net, fake, adapters.shard_options(options));
  adapters.initialize(sharded.core(), 4);
  for (int step = 0; step < 3; ++step) {
    fake->reset_counts();
    Step open = sharded.begin_step(3);
    for (int m = 0; m < 3; ++m) {
      const MicroBatch batch = micro_batch(step, m);
      open.backward(sharded.run([&](auto& model) { return model.loss(batch); }), 1);
    }
    open.finish({.learning_rate = 0});
    if (step == 0) continue;  // Frozen units are gathered once.
    EXPECT_EQ(fake->count(comm::CollectiveKind::kGather).collectives, 1);
    EXPECT_EQ(fake->count(comm::CollectiveKind::kFold).collectives, 1);
  }
}

TEST(Lora, AdaptersGoThroughFilesAtAnyNumberOfRanks) {
  const auto directory = std::filesystem::temp_directory_path() / cat("lora_test_", getpid());
  LoraConfig config = base_config();
  config.use_dora = true;
  config.bias = lora::BiasMode::kLoraOnly;
  config.modules_to_save = {"lm_head"};
  for (const int writers : {1, 3}) {
    Values saved;
    run_ranks(writers, [&](comm::Communicator& own) {
      AdaptNet net = make_adapt_net();
      Adapters adapters(*net, config);
      auto sharded = fully_shard(net, borrow(own), adapters.shard_options(lora_options()));
      adapters.initialize(sharded.core(), 4);
      EXPECT_THROW(save_adapter(sharded.core(), adapters, directory.string()), ModelError)
          << "it has never been updated";
      sharded.initialize([](const std::string& name, c10::IntArrayRef, int64_t begin,
                            std::span<float> values) {
        for (size_t i = 0; i < values.size(); ++i)
          values[i] = static_cast<float>(name.size()) + static_cast<float>(begin + int64_t(i)) / 64;
      });
      save_adapter(sharded.core(), adapters, directory.string());
      const Values values = values_of(sharded.core());
      if (own.rank() == 0) saved = values;
    });
    for (const int readers : {1, 2, 4}) {
      run_ranks(readers, [&](comm::Communicator& own) {
        AdaptNet net = make_adapt_net();
        Adapters adapters(*net, lora::read_adapter_config(directory.string()));
        auto sharded = fully_shard(net, borrow(own), adapters.shard_options(lora_options()));
        load_adapter(sharded.core(), adapters, directory.string());
        const Values loaded = values_of(sharded.core());
        if (own.rank() != 0) return;
        ASSERT_EQ(loaded.size(), saved.size());
        for (const auto& [name, value] : saved)
          EXPECT_TRUE(at::equal(loaded.at(name), value)) << name;
      });
    }
  }
  std::filesystem::remove_all(directory);
}

// The model with the files of `state` in its parameters.
void fill(AdaptNet& net, const checkpoint::StateDict& state) {
  const at::NoGradGuard no_graph;
  auto parameters = net->named_parameters();
  for (const checkpoint::TensorPart& tensor : state.tensors) {
    Tensor& parameter = parameters[tensor.name];
    ASSERT_EQ(parameter.sizes().vec(), tensor.shape);
    auto* bytes = static_cast<std::byte*>(parameter.data_ptr());
    // Pieces that begin and end within rows.
    for (int64_t at = 0; at < tensor.numel; at += 17) {
      const int64_t count = std::min<int64_t>(17, tensor.numel - at);
      tensor.read(at, {bytes + at * 4, static_cast<size_t>(count) * 4});
    }
  }
}

TEST(Lora, MergedModelsComputeTheSame) {
  const auto directory = std::filesystem::temp_directory_path() / cat("lora_merge_", getpid());
  LoraConfig embedding = base_config();
  embedding.target_modules = {"table", "up"};
  embedding.modules_to_save = {"lm_head"};
  LoraConfig dora = base_config();
  dora.use_dora = true;
  dora.target_modules = {"table", "down"};
  for (const LoraConfig& config : {base_config(), embedding, dora}) {
    std::vector<io::TensorSpec> specs;
    std::vector<std::span<const std::byte>> data;
    AdaptNet base = make_adapt_net();
    for (const auto& parameter : base->named_parameters()) {
      specs.push_back({parameter.key(), DType::kF32, parameter.value().sizes().vec()});
      data.push_back({static_cast<const std::byte*>(parameter.value().data_ptr()),
                      static_cast<size_t>(parameter.value().nbytes())});
    }
    std::filesystem::create_directories(directory);
    io::write_safetensors((directory / "model.safetensors").string(), specs, data);
    double adapted = 0;
    run_ranks(2, [&](comm::Communicator& own) {
      AdaptNet net = make_adapt_net();
      Adapters adapters(*net, config);
      auto sharded = fully_shard(net, borrow(own), adapters.shard_options(lora_options()));
      adapters.initialize(sharded.core(), 4);
      for (int step = 0; step < 3; ++step) {
        Step open = sharded.begin_step(1);
        open.backward(
            sharded.run([&](auto& model) { return model.loss(micro_batch(step, own.rank())); }), 1);
        open.finish({.learning_rate = 0.05});
      }
      save_adapter(sharded.core(), adapters, directory.string());
      const at::NoGradGuard no_graph;
      const Tensor loss = sharded.run([&](auto& model) { return model.loss(micro_batch(9, 0)); });
      if (own.rank() == 0) adapted = loss.item<double>();
    });
    AdaptNet merged = make_adapt_net();
    const double before = merged->loss(micro_batch(9, 0)).item<double>();
    fill(merged, lora::merged_state(directory.string(), directory.string()));
    const double after = merged->loss(micro_batch(9, 0)).item<double>();
    EXPECT_NEAR(after, adapted, 1e-5 * adapted);
    EXPECT_GT(std::abs(before - adapted), 1e-2 * adapted) << "it had something to merge";
  }
  std::filesystem::remove_all(directory);
}

TEST(Lora, AdaptersAreSwitchedByName) {
  run_ranks(2, [&](comm::Communicator& own) {
    AdaptNet net = make_adapt_net();
    Adapters adapters(*net, base_config());
    LoraConfig other = base_config();
    other.target_modules = {"down"};
    adapters.add(other, "second");
    auto sharded = fully_shard(net, borrow(own), adapters.shard_options(lora_options()));
    sharded.initialize(
        [](const std::string& name, c10::IntArrayRef, int64_t begin, std::span<float> values) {
          for (size_t i = 0; i < values.size(); ++i)
            values[i] = 0.01F * static_cast<float>((name.size() * 7 + size_t(begin) + i) % 13);
        });
    const auto loss = [&] {
      const at::NoGradGuard no_graph;
      const MicroBatch batch = micro_batch(0, 0);
      return sharded.run([&](auto& model) { return model.loss(batch); }).template item<double>();
    };
    const double first = loss();
    adapters.activate({"second"});
    const double second = loss();
    adapters.activate({"default", "second"});
    const double both = loss();
    adapters.activate({});
    const double none = loss();
    EXPECT_EQ(std::set<double>({first, second, both, none}).size(), 4U);
    adapters.activate({"default"});
    EXPECT_EQ(loss(), first);
    EXPECT_THROW(adapters.activate({"third"}), ConfigError);
  });
}

TEST(Lora, RefusesTargetsThatAreNotThere) {
  const auto refusal = [](const LoraConfig& config) {
    try {
      AdaptNet net = make_adapt_net();
      Adapters(*net, config);
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  LoraConfig config = base_config();
  config.target_modules = {"q_proj"};
  EXPECT_NE(refusal(config).find("Those that could be: down, lm_head, table, up"),
            std::string::npos)
      << refusal(config);
  config.target_modules = {"block1"};
  EXPECT_NE(refusal(config).find("is no layer that can have an adapter"), std::string::npos);
}

}  // namespace
}  // namespace fsdp::testing
