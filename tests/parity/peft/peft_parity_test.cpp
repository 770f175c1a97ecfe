// Adapters of a 4-layer Llama against PEFT: same base, same first values, same batches.
//
// PEFT's loss and ours differ by the order of sums, some 1e-7 after 20 steps: hence 1e-6. Adapters
// differ by what AdamW makes of gradients near zero: the runs hold PEFT's distance from itself, row
// by row, and we may be 3 times as far, or 1e-6.

#include <gtest/gtest.h>

#include <map>
#include <mutex>
#include <optional>

#include "libfsdp/checkpoint/convert_state.h"
#include "libfsdp/checkpoint/load_state.h"
#include "libfsdp/io/hf_config.h"
#include "libfsdp/kernels/quantized_weight.h"
#include "libfsdp/lora/merge.h"
#include "libfsdp/lora/peft_files.h"
#include "libfsdp/lora/prompts.h"
#include "libfsdp/lora/quantized.h"
#include "libfsdp/models/batch.h"
#include "libfsdp/models/generate.h"
#include "libfsdp/models/registry.h"
#include "libfsdp/shard/sharded.h"
#include "libfsdp/shard/state.h"
#include "tests/parity/tensors.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

namespace fs = std::filesystem;

constexpr int kSteps = 20;
constexpr int kMicroBatches = 4;

struct Case {
  const char* kind;
  plan::Strategy strategy;
  int ranks;
  bool slots;
  bool checkpointing;
  std::optional<lora::QuantizationOptions> quantization = {};
  std::string base = "base";
};

std::string name_of(const Case& one) {
  return cat(one.kind, plan::strategy_name(one.strategy), "Ranks", one.ranks,
             one.slots ? "Slots" : "", one.checkpointing ? "Recompute" : "Keep");
}
void PrintTo(const Case& one, std::ostream* out) { *out << name_of(one); }

using Weights = std::map<std::string, at::Tensor>;

Weights weights_of(const checkpoint::StateDict& state) {
  Weights weights;
  for (const checkpoint::TensorPart& tensor : state.tensors) {
    at::Tensor& values = weights[tensor.name] = at::zeros({tensor.numel});
    if (tensor.numel > 0)
      tensor.read(
          0, {static_cast<std::byte*>(values.data_ptr()), static_cast<size_t>(values.nbytes())});
  }
  return weights;
}

struct Course {
  std::vector<double> losses, norms;
  std::map<std::string, std::map<int64_t, at::Tensor>> pieces;  // By name and first element.
};

std::shared_ptr<lora::Tuner> make_tuner(torch::nn::Module& model, const std::string& directory) {
  switch (lora::read_peft_type(directory)) {
    case lora::PeftType::kLora:
      return std::make_shared<lora::Adapters>(model, lora::read_adapter_config(directory));
    case lora::PeftType::kAdaptionPrompt:
      return std::make_shared<lora::LlamaAdapter>(model,
                                                  lora::read_llama_adapter_config(directory));
    case lora::PeftType::kPrefixTuning:
      break;
  }
  lora::PrefixConfig config = lora::read_prefix_config(directory);
  config.prefix_projection = config.projected;
  return std::make_shared<lora::PrefixTuning>(model, config);
}

// PEFT's first values; of a projection those of its layers, which PEFT's own files do not hold.
void load_start(ShardedCore& core, const lora::Tuner& tuner, const std::string& directory) {
  if (!fs::exists(directory + "/encoder.safetensors"))
    return lora::load_adapter(core, tuner, directory);
  checkpoint::load_state(tuner.state(core), checkpoint::StoredTensors::open(directory, "encoder"));
  core.publish();
}

Course train(const Case& one, const std::string& directory, bool save) {
  const std::string base = cat(FSDP_RUNS_DIR, "/", one.base);
  const auto batches = io::SafetensorsFile::open(cat(FSDP_RUNS_DIR, "/batches.safetensors"));
  Course result;
  std::mutex mutex;
  run_ranks(one.ranks, [&](comm::Communicator& own) {
    auto model =
        models::make_causal_lm(io::HfModelConfig::read(base), at::TensorOptions(at::kMeta));
    const bool is_tied = !model->lm_head;
    const auto adapters = make_tuner(*model, directory + "/start");
    std::optional<lora::QuantizedWeights> quantized;
    if (one.quantization) quantized.emplace(*model, *one.quantization);
    ShardOptions options;
    options.strategy = one.strategy;
    options.activation_checkpointing = one.checkpointing;
    options.deterministic = true;
    options.placement.force_slot_home = one.slots;
    auto sharded = fully_shard(model, std::shared_ptr<comm::Communicator>(&own, [](auto*) {}),
                               adapters->shard_options(options));
    const auto weights = io::HfWeights::open(base);
    std::vector<std::string> aliases;
    if (is_tied) aliases = {"lm_head.weight"};
    if (quantized)
      aliases.insert(aliases.end(), quantized->file_names().begin(), quantized->file_names().end());
    load_weights(sharded.core(), weights, aliases,
                 quantized ? quantized->left_out() : lora::Adapters::is_adapter);
    if (quantized) quantized->load(sharded.core(), weights);
    load_start(sharded.core(), *adapters, directory + "/start");
    const auto batch_of = [&](int step, int m) {
      const std::string place = cat(step, ".", m);
      return models::make_batch(read(batches, "ids." + place), read(batches, "labels." + place));
    };
    for (int step = 0; step < kSteps; ++step) {
      Step open = sharded.begin_step(kMicroBatches / one.ranks);
      for (int m = own.rank(); m < kMicroBatches; m += one.ranks) {
        const auto batch = batch_of(step, m);
        open.backward(sharded.run([&](auto& lm) { return lm.loss(batch); }),
                      batch.trainable_tokens());
      }
      const StepStats stats = open.finish({.learning_rate = 1e-3, .max_grad_norm = 1.0});
      if (own.rank() != 0) continue;
      result.losses.push_back(stats.loss);
      result.norms.push_back(stats.grad_norm);
    }
    const checkpoint::StateDict state = adapters->files(sharded.core());
    const Weights mine = weights_of(state);
    {
      const std::lock_guard lock(mutex);
      for (const checkpoint::TensorPart& tensor : state.tensors)
        if (tensor.numel > 0) result.pieces[tensor.name][tensor.at] = mine.at(tensor.name);
    }
    if (!save) return;
    lora::save_adapter(sharded.core(), *adapters, directory + "/ours");
    const at::NoGradGuard no_graph;
    const at::Tensor ids = read(batches, "ids.0.0");
    const at::Tensor logits = sharded.run([&](auto& lm) { return lm.logits(ids); }).contiguous();
    const auto forward = [&](const at::Tensor& new_ids, const auto& kept) {
      return sharded.run([&](auto& lm) { return lm.forward_cached(new_ids, kept); });
    };
    const auto cache =
        std::make_shared<models::KvCache>(sharded.module()->config(), 64, at::kFloat);
    const std::vector<int64_t> tokens = models::generate(
        forward, cache, {ids.const_data_ptr<int64_t>(), static_cast<size_t>(ids.size(1))},
        {.max_new_tokens = 12});
    const std::vector<io::TensorSpec> specs = {
        {"logits", DType::kF32, logits.sizes().vec()},
        {"tokens", DType::kI64, {static_cast<int64_t>(tokens.size())}}};
    const auto bytes_of = [](const void* data, size_t size) {
      return std::span(static_cast<const std::byte*>(data), size);
    };
    if (own.rank() == 0)
      io::write_safetensors(directory + "/ours_logits.safetensors", specs,
                            {{bytes_of(logits.data_ptr(), static_cast<size_t>(logits.nbytes())),
                              bytes_of(tokens.data(), tokens.size() * sizeof(int64_t))}});
  });
  return result;
}

void merge(const std::string& base_name, const std::string& directory) {
  const fs::path base = fs::path(FSDP_RUNS_DIR) / base_name,
                 merged = fs::path(directory) / "merged";
  fs::remove_all(merged);
  fs::create_directories(merged);
  checkpoint::write_converted(lora::merged_state(base.string(), directory + "/ours"), {},
                              merged.string());
  fs::copy_file(base / "config.json", merged / "config.json");
}

class PeftParity : public ::testing::TestWithParam<Case> {};

TEST_P(PeftParity, FollowsPeftForTwentySteps) {
  const Case one = GetParam();
  const std::string directory = cat(FSDP_RUNS_DIR, "/", one.kind);
  const auto file = io::SafetensorsFile::open(directory + "/run.safetensors");
  const bool save = one.ranks == 2 && one.strategy == plan::Strategy::kFullShard && !one.slots;
  const Course got = train(one, directory, save);
  const bool is_lora = lora::read_peft_type(directory + "/start") == lora::PeftType::kLora;
  if (save && is_lora) merge(one.base, directory);
  const at::Tensor losses = read(file, "losses"), norms = read(file, "norms");
  ASSERT_EQ(got.losses.size(), size_t{kSteps});
  for (int step = 0; step < kSteps; ++step) {
    const double loss = losses[step].item<double>(), norm = norms[step].item<double>();
    EXPECT_NEAR(got.losses[size_t(step)], loss, 1e-6 * loss) << "step " << step;
    EXPECT_NEAR(got.norms[size_t(step)], norm, 1e-4 * norm) << "step " << step;
  }
  const auto end = io::SafetensorsFile::open(directory + "/end/adapter_model.safetensors");
  const double tolerance = std::max(1e-6, 3 * read(file, "spread").item<double>());
  EXPECT_LE(tolerance, 1e-3);
  EXPECT_EQ(got.pieces.size(), end.entries().size());
  for (const io::TensorEntry& entry : end.entries()) {
    const at::Tensor expected = read(end, entry.name).view({-1});
    const auto found = got.pieces.find(entry.name);
    ASSERT_NE(found, got.pieces.end()) << entry.name;
    at::Tensor values = at::zeros_like(expected);
    for (const auto& [at, piece] : found->second) values.narrow(0, at, piece.numel()).copy_(piece);
    EXPECT_LE((values - expected).norm().item<double>(), tolerance * expected.norm().item<double>())
        << entry.name;
  }
}

// PEFT saves a head that has an adapter whole, beside it: it must be the model's.
TEST(PeftFiles, AnAdapterOfAnotherHeadIsRefused) {
  const std::string start = FSDP_RUNS_DIR "/head/start", base = FSDP_RUNS_DIR "/other";
  const std::string errors = run_ranks_quietly(2, [&](comm::Communicator& own) {
    auto model =
        models::make_causal_lm(io::HfModelConfig::read(base), at::TensorOptions(at::kMeta));
    const auto adapters = make_tuner(*model, start);
    auto sharded = fully_shard(model, std::shared_ptr<comm::Communicator>(&own, [](auto*) {}),
                               adapters->shard_options({}));
    load_weights(sharded.core(), io::HfWeights::open(base), {}, lora::Adapters::is_adapter);
    lora::load_adapter(sharded.core(), *adapters, start);
  });
  EXPECT_NE(errors.find("was trained on another 'lm_head.weight'"), std::string::npos) << errors;
}

// That is what the adapter is merged into.
TEST(PeftFiles, AWeightBesideItsAdapterIsMergedInto) {
  const std::string start = FSDP_RUNS_DIR "/head/start";
  const auto file = io::SafetensorsFile::open(start + "/adapter_model.safetensors");
  const std::string head = "base_model.model.lm_head.";
  const double scaling = lora::read_adapter_config(start).scaling_of("lm_head");
  const at::Tensor truth =
      read(file, head + "base_layer.weight") +
      scaling * at::mm(read(file, head + "lora_B.weight"), read(file, head + "lora_A.weight"));
  for (const checkpoint::TensorPart& tensor :
       lora::merged_state(FSDP_RUNS_DIR "/other", start).tensors) {
    if (tensor.name != "lm_head.weight") continue;
    at::Tensor got = at::empty(tensor.shape);
    tensor.read(0, {static_cast<std::byte*>(got.data_ptr()), static_cast<size_t>(got.nbytes())});
    EXPECT_TRUE(at::allclose(got, truth, 1e-6, 1e-7));
    return;
  }
  FAIL() << "no head";
}

// The base with each linear layer's weight quantised and read back, as a model of its own.
std::string round_trip(const lora::QuantizationOptions& options, const std::string& name) {
  const fs::path from = fs::path(FSDP_RUNS_DIR) / "base", to = fs::path(FSDP_RUNS_DIR) / name;
  fs::create_directories(to);
  fs::copy_file(from / "config.json", to / "config.json", fs::copy_options::overwrite_existing);
  const auto weights = io::HfWeights::open(from.string());
  std::vector<io::TensorSpec> specs;
  std::vector<at::Tensor> values;
  for (const std::string& tensor : weights.names()) {
    const auto found = *weights.find(tensor);
    specs.push_back({tensor, DType::kF32, found.entry->shape});
    at::Tensor value = read(*found.file, tensor);
    if (tensor.ends_with("_proj.weight")) {
      const int64_t n = value.numel();
      const bool bytes = options.format == lora::PackedFormat::kInt8;
      const int64_t block = bytes ? value.size(1) : options.blocksize;
      std::vector<uint8_t> codes(static_cast<size_t>(n));
      std::vector<float> scales(static_cast<size_t>((n + block - 1) / block));
      const auto count = static_cast<int64_t>(scales.size());
      const auto code = options.format == lora::PackedFormat::kFp4 ? kernels::FourBitCode::kFp4
                                                                   : kernels::FourBitCode::kNf4;
      if (bytes) {
        kernels::quantize_int8(value.data_ptr(), DType::kF32, value.size(0), block,
                               reinterpret_cast<int8_t*>(codes.data()), scales.data());
      } else {
        kernels::quantize_4bit(value.data_ptr(), DType::kF32, n, code, block, codes.data(),
                               scales.data());
      }
      if (options.double_quant) {
        const float mean = kernels::mean_absmax(scales.data(), count);
        std::vector<uint8_t> nested_codes(scales.size());
        std::vector<float> nested(scales.size());
        kernels::quantize_absmax(scales.data(), count, mean, nested_codes.data(), nested.data());
        kernels::dequantize_absmax(nested_codes.data(), nested.data(), mean, 0, count,
                                   scales.data());
      }
      value = value.clone();
      if (bytes) {
        kernels::dequantize_int8(reinterpret_cast<const int8_t*>(codes.data()), scales.data(),
                                 block, 0, n, value.data_ptr(), DType::kF32);
      } else {
        kernels::dequantize_4bit(codes.data(), scales.data(), n, code, block, value.data_ptr(),
                                 DType::kF32);
      }
    }
    values.push_back(value.contiguous());
  }
  std::vector<std::span<const std::byte>> data;
  for (const at::Tensor& value : values)
    data.push_back(
        {static_cast<const std::byte*>(value.data_ptr()), static_cast<size_t>(value.nbytes())});
  io::write_safetensors((to / "model.safetensors").string(), specs, data);
  return name;
}

// A quantised base trains adapters to the bits of a base that holds what its codes mean.
TEST(Qlora, HasTheBitsOfTheWeightsThatItsCodesMean) {
  const std::string directory = cat(FSDP_RUNS_DIR, "/lora");
  using lora::PackedFormat;
  const std::map<std::string, lora::QuantizationOptions> formats = {
      {"nf4", {}},
      {"nf4_double", {.blocksize = 32, .double_quant = true}},
      {"fp4", {.format = PackedFormat::kFp4}},
      {"int8", {.format = PackedFormat::kInt8}}};
  for (const auto& [name, options] : formats) {
    using enum plan::Strategy;
    const Case plain{.kind = "lora",
                     .strategy = kFullShard,
                     .ranks = 1,
                     .slots = false,
                     .checkpointing = false,
                     .base = round_trip(options, name)};
    const Course truth = train(plain, directory, false);
    EXPECT_NE(truth.losses.back(), truth.losses.front());
    for (const int ranks : {1, 2, 4}) {
      for (const bool slots : {false, true}) {
        SCOPED_TRACE(cat(name, " on ", ranks, slots ? " in slots" : ""));
        const Case packed{.kind = "lora",
                          .strategy = ranks == 4 ? kHybridShard : kFullShard,
                          .ranks = ranks,
                          .slots = slots,
                          .checkpointing = slots,
                          .quantization = options};
        EXPECT_EQ(train(packed, directory, false).losses, truth.losses);
      }
    }
  }
}

std::vector<Case> all_cases() {
  using enum plan::Strategy;
  std::vector<Case> cases;
  for (const char* kind :
       {"lora", "rslora", "dora", "patterns", "prefix", "projection", "llama_adapter"}) {
    cases.push_back({kind, kFullShard, 2, false, false});
    cases.push_back({kind, kFullShard, 2, true, true});
  }
  for (const bool slots : {false, true}) {
    for (const auto& [kind, base] :
         {std::pair{"embedding", "untied"}, std::pair{"head", "untied"},
          std::pair{"bias", "biased"}, std::pair{"lora_only", "biased"}}) {
      cases.push_back({.kind = kind,
                       .strategy = kFullShard,
                       .ranks = 2,
                       .slots = slots,
                       .checkpointing = slots,
                       .base = base});
    }
  }
  for (const bool checkpointing : {false, true}) {
    cases.push_back({"lora", kFullShard, 1, false, checkpointing});
    cases.push_back({"lora", kShardGradOp, 4, true, checkpointing});
    cases.push_back({"lora", kNoShard, 2, false, checkpointing});
  }
  for (const char* kind : {"prefix", "llama_adapter"}) {
    cases.push_back({kind, kFullShard, 1, false, false});
    cases.push_back({kind, kShardGradOp, 4, true, true});
  }
  return cases;
}
INSTANTIATE_TEST_SUITE_P(All, PeftParity, ::testing::ValuesIn(all_cases()),
                         [](const auto& info) { return name_of(info.param); });

}  // namespace
}  // namespace fsdp::testing
