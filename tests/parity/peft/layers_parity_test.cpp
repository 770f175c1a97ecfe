// Adapters of LibTorch's own layers against PEFT: same base, same first values, same batches.

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <mutex>

#include "libfsdp/base/error.h"
#include "libfsdp/io/safetensors.h"
#include "libfsdp/lora/adapters.h"
#include "libfsdp/lora/peft_files.h"
#include "libfsdp/shard/sharded.h"
#include "libfsdp/shard/state.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

namespace nn = torch::nn;
using at::Tensor;

constexpr int kSteps = 20;
constexpr int kMicroBatches = 4;
constexpr int64_t kRows = 4;

// As layers.py has it.
struct LayersImpl : nn::Module {
  LayersImpl()
      : table(23, 12),
        line(nn::Conv1dOptions(12, 16, 3).padding(1)),
        grouped(nn::Conv1dOptions(16, 16, 3).padding(torch::kSame).groups(2)),
        plane(nn::Conv2dOptions(4, 6, 3).stride({1, 2}).padding(1)),
        space(nn::Conv3dOptions(2, 4, {1, 3, 3}).padding({0, 1, 1}).bias(false)),
        hidden(192, 24),
        head(nn::LinearOptions(24, 23).bias(false)) {
    register_module("table", table);
    register_module("line", line);
    register_module("grouped", grouped);
    register_module("plane", plane);
    register_module("space", space);
    register_module("hidden", hidden);
    register_module("head", head);
  }
  Tensor forward(const Tensor& ids) {
    Tensor x = at::gelu(line(table(ids).transpose(1, 2)));
    x = x + at::tanh(grouped(x));
    x = at::gelu(plane(x.reshape({-1, 4, 4, 8})));
    x = at::gelu(space(x.reshape({-1, 2, 3, 4, 4})));
    return head(at::tanh(hidden(x.flatten(1))));
  }
  nn::Embedding table;
  nn::Conv1d line;
  nn::Conv1d grouped;
  nn::Conv2d plane;
  nn::Conv3d space;
  Unit<nn::Linear> hidden;  // Of its own; the rest is the root.
  nn::Linear head;
};
TORCH_MODULE(Layers);

Tensor read(const io::SafetensorsFile& file, const std::string& name) {
  const io::TensorEntry* entry = file.find(name);
  if (!entry) throw ModelError("no tensor " + name);
  const auto type = entry->dtype == DType::kI64   ? at::kLong
                    : entry->dtype == DType::kF64 ? at::kDouble
                                                  : at::kFloat;
  Tensor tensor = at::empty(entry->shape, at::TensorOptions(type));
  file.read(*entry, 0,
            {static_cast<std::byte*>(tensor.data_ptr()), static_cast<size_t>(tensor.nbytes())});
  return tensor;
}

struct Course {
  std::vector<double> losses;
  std::map<std::string, Tensor> end;
};

Course train(const std::string& directory, int ranks, bool recompute) {
  const std::string base = FSDP_RUNS_DIR "/layers_base";
  const auto batches = io::SafetensorsFile::open(base + "/batches.safetensors");
  Course result;
  run_ranks(ranks, [&](comm::Communicator& own) {
    Layers net;
    lora::Adapters adapters(*net, lora::read_adapter_config(directory + "/start"));
    ShardOptions options;
    options.deterministic = true;
    options.activation_checkpointing = recompute;
    options.placement.force_slot_home = recompute;
    options.groups = {{.name = "all", .weight_decay = 0}};
    auto sharded = fully_shard(net, std::shared_ptr<comm::Communicator>(&own, [](auto*) {}),
                               adapters.shard_options(options));
    load_weights(sharded.core(), io::HfWeights::open(base), {}, lora::Adapters::is_adapter);
    load_adapter(sharded.core(), adapters, directory + "/start");
    for (int step = 0; step < kSteps; ++step) {
      Step open = sharded.begin_step(kMicroBatches / ranks);
      for (int m = own.rank(); m < kMicroBatches; m += ranks) {
        const Tensor logits = sharded(read(batches, cat("ids.", step, ".", m)));
        open.backward(at::cross_entropy_loss(logits, read(batches, cat("labels.", step, ".", m)),
                                             {}, at::Reduction::Sum),
                      kRows);
      }
      const double loss = open.finish({.learning_rate = 1e-3}).loss;
      if (own.rank() == 0) result.losses.push_back(loss);
    }
    lora::save_adapter(sharded.core(), adapters, directory + "/ours");
    const at::NoGradGuard no_graph;
    const Tensor logits = sharded(read(batches, "ids.0.0")).contiguous();
    if (own.rank() != 0) return;
    const std::vector<io::TensorSpec> specs = {{"logits", DType::kF32, logits.sizes().vec()}};
    const std::span<const std::byte> bytes(static_cast<const std::byte*>(logits.data_ptr()),
                                           static_cast<size_t>(logits.nbytes()));
    io::write_safetensors(directory + "/ours_logits.safetensors", specs, {{bytes}});
    const auto ours = io::SafetensorsFile::open(directory + "/ours/adapter_model.safetensors");
    for (const io::TensorEntry& entry : ours.entries())
      result.end[entry.name] = read(ours, entry.name);
  });
  return result;
}

TEST(PeftLayers, FollowPeftForTwentySteps) {
  for (const char* kind : {"layers_lora", "layers_dora"}) {
    for (const int ranks : {1, 2}) {
      SCOPED_TRACE(cat(kind, " on ", ranks));
      const std::string directory = cat(FSDP_RUNS_DIR "/", kind);
      const auto run = io::SafetensorsFile::open(directory + "/run.safetensors");
      const Course got = train(directory, ranks, ranks == 2);
      const Tensor losses = read(run, "losses");
      for (int step = 0; step < kSteps; ++step) {
        const double loss = losses[step].item<double>();
        EXPECT_NEAR(got.losses[static_cast<size_t>(step)], loss, 1e-6 * loss) << "step " << step;
      }
      const auto end = io::SafetensorsFile::open(directory + "/end/adapter_model.safetensors");
      const double tolerance = std::max(1e-6, 3 * read(run, "spread").item<double>());
      EXPECT_LE(tolerance, 1e-3);
      EXPECT_EQ(got.end.size(), end.entries().size());
      for (const io::TensorEntry& entry : end.entries()) {
        const auto found = got.end.find(entry.name);
        ASSERT_NE(found, got.end.end()) << entry.name;
        const Tensor expected = read(end, entry.name);
        EXPECT_LE((found->second - expected).norm().item<double>(),
                  tolerance * expected.norm().item<double>())
            << entry.name;
      }
    }
  }
}

}  // namespace
}  // namespace fsdp::testing
