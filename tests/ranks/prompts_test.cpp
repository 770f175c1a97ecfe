// Prefix tuning and llama-adapter in sharded training of a small Llama. That they compute what PEFT
// does is tests/parity/peft.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/fake.h"
#include "libfsdp/io/file.h"
#include "libfsdp/lora/peft_files.h"
#include "libfsdp/lora/prompts.h"
#include "libfsdp/models/registry.h"
#include "tests/ranks/plain_training.h"
#include "tests/ranks/training_run.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

using at::Tensor;
using Model = models::LlamaForCausalLM;

constexpr int kPromptSteps = 5;
constexpr int64_t kVocabulary = 31;
const std::vector<std::string> kKinds = {"prefix", "projection", "llama_adapter"};

Model make_model(at::ScalarType dtype = at::kFloat) {
  models::LlamaConfig config;
  config.model_type = "llama";
  config.vocab_size = kVocabulary;
  config.hidden_size = 16;
  config.intermediate_size = 24;
  config.num_hidden_layers = 3;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 4;
  config.max_position_embeddings = 64;
  config.tie_word_embeddings = true;
  return models::make_causal_lm(config, at::TensorOptions(at::kMeta).dtype(dtype));
}

std::shared_ptr<lora::Tuner> make_tuner(Model& model, const std::string& kind) {
  if (kind == "llama_adapter") {
    return std::make_shared<lora::LlamaAdapter>(
        *model, lora::LlamaAdapterConfig{.adapter_len = 3, .adapter_layers = 2});
  }
  return std::make_shared<lora::PrefixTuning>(
      *model,
      lora::PrefixConfig{.num_virtual_tokens = 3, .prefix_projection = kind == "projection"});
}

Tensor random_ids(int seed, std::vector<int64_t> shape) {
  Tensor ids = at::empty(shape, at::kLong);
  for (int64_t i = 0; i < ids.numel(); ++i)
    ids.data_ptr<int64_t>()[i] =
        static_cast<int64_t>(bits_at(static_cast<uint64_t>(seed), uint64_t(i)) % kVocabulary);
  return ids;
}

// Two rows of packed documents.
models::CausalLmBatch batch_of(int seed) {
  const Tensor ids = random_ids(seed, {2, 12});
  const std::span<const int64_t> numbers(ids.const_data_ptr<int64_t>(), 24);
  const std::vector<models::DocumentSpan> documents = {{0, 0, 5}, {0, 5, 12}, {1, 0, 9}};
  return models::make_batch(2, 12, numbers, numbers, {}, documents);
}

// The base's weights: equal for every way to divide them.
template <class Sharded>
void fill(Sharded& sharded, lora::Tuner* tuner, double deviation = 0.2) {
  sharded.initialize(
      [&](const std::string& name, c10::IntArrayRef shape, int64_t begin, std::span<float> values) {
        if (shape.size() == 1) {
          std::fill(values.begin(), values.end(), 1.0F);
        } else {
          fill_normal(stream_key(7, name), begin, values, 0, deviation);
        }
      });
  if (tuner) tuner->initialize(sharded.core(), 4);
}

ShardOptions prompt_options() {
  ShardOptions options = base_options();
  options.groups = {{.name = "all", .weight_decay = 0}};
  options.param_group = nullptr;
  options.verify_plans = true;
  return options;
}

using Values = std::map<std::string, Tensor>;

Values values_of(ShardedCore& core) {
  Values values;
  for (const ParameterInfo& info : core.parameters())
    if (info.trainable) values[info.name] = full_parameter(core, info.name);
  return values;
}

struct PromptRun {
  std::vector<double> losses;
  Values start, end;
};

PromptRun train(int ranks, const std::string& kind, const ShardOptions& options) {
  PromptRun result;
  run_ranks(ranks, [&](comm::Communicator& own) {
    const bool narrow = options.param_dtype == DType::kBF16;
    Model model = make_model(narrow ? at::kBFloat16 : at::kFloat);
    const auto tuner = make_tuner(model, kind);
    auto sharded = fully_shard(model, borrow(own), tuner->shard_options(options));
    fill(sharded, tuner.get());
    const Values start = values_of(sharded.core());
    std::vector<double> losses;
    for (int step = 0; step < kPromptSteps; ++step) {
      Step open = sharded.begin_step(kAllMicroBatches / ranks);
      for (int m = own.rank(); m < kAllMicroBatches; m += ranks) {
        const auto batch = batch_of(100 * step + m);
        open.backward(sharded.run([&](auto& lm) { return lm.loss(batch); }),
                      batch.trainable_tokens());
      }
      losses.push_back(open.finish({.learning_rate = 0.05}).loss);
    }
    Values end = values_of(sharded.core());
    if (own.rank() == 0) result = {losses, start, std::move(end)};
  });
  return result;
}

TEST(Prompts, NoStrategyNorNumberOfRanksChangesABit) {
  for (const std::string& kind : kKinds) {
    for (const bool bf16 : {false, true}) {
      ShardOptions options = prompt_options();
      if (bf16) options.param_dtype = DType::kBF16;
      const PromptRun truth = train(1, kind, options);
      EXPECT_LT(truth.losses.back(), truth.losses.front());
      for (const auto& [name, value] : truth.end)
        EXPECT_FALSE(at::equal(value, truth.start.at(name))) << kind << ": " << name;
      for (const plan::Strategy strategy :
           {plan::Strategy::kFullShard, plan::Strategy::kShardGradOp, plan::Strategy::kHybridShard,
            plan::Strategy::kNoShard}) {
        for (const int ranks : {1, 2, 4}) {
          const bool hybrid = strategy == plan::Strategy::kHybridShard;
          if (hybrid && ranks == 1) continue;
          if (bf16 && strategy != plan::Strategy::kFullShard) continue;
          for (const int way : {0, 1, 2, 3}) {
            if (way == 2 && ranks != 2) continue;
            options.strategy = strategy;
            options.placement = {
                .sharding_group_size = hybrid ? 2 : 0,
                .force_slot_home = way == 1,
                .offload = way == 2 ? plan::Offload::kParameters : plan::Offload::kNone};
            options.activation_checkpointing = way == 3;
            SCOPED_TRACE(cat(kind, bf16 ? " bf16 " : " ", plan::strategy_name(strategy), " on ",
                             ranks, ", ", way));
            const PromptRun got = train(ranks, kind, options);
            EXPECT_EQ(got.losses, truth.losses);
            for (const auto& [name, value] : truth.end)
              EXPECT_TRUE(at::equal(got.end.at(name), value)) << name;
          }
        }
      }
    }
  }
}

TEST(Prompts, AStepCostsOneGatherAndOneReduction) {
  for (const std::string& kind : kKinds) {
    auto fake = std::make_shared<comm::FakeCommunicator>(0, 4, comm::FakeOptions{});
    ShardOptions options = prompt_options();
    options.deterministic = false;
    options.poison = false;
    options.strategy = plan::Strategy::kShardGradOp;
    options.placement = {.force_slot_home = true, .accumulation = plan::Accumulation::kUnsharded};
    Model model = make_model();
    const auto tuner = make_tuner(model, kind);
    auto sharded = fully_shard(model, fake, tuner->shard_options(options));
    fill(sharded, tuner.get());
    for (int step = 0; step < 3; ++step) {
      fake->reset_counts();
      Step open = sharded.begin_step(3);
      for (int m = 0; m < 3; ++m)
        open.backward(sharded.run([&](auto& lm) { return lm.loss(batch_of(m)); }), 1);
      open.finish({.learning_rate = 0});
      if (step == 0) continue;  // Frozen units are gathered once.
      EXPECT_EQ(fake->count(comm::CollectiveKind::kGather).collectives, 1) << kind;
      EXPECT_EQ(fake->count(comm::CollectiveKind::kFold).collectives, 1) << kind;
    }
  }
}

// Every document of a pack, and every token that is generated from a cache, sees what it would
// alone.
TEST(Prompts, PacksAndCachesGiveTheLogitsOfWholeSequences) {
  run_ranks(2, [&](comm::Communicator& own) {
    for (const std::string& kind : kKinds) {
      Model model = make_model();
      const auto tuner = make_tuner(model, kind);
      auto sharded = fully_shard(model, borrow(own), tuner->shard_options(prompt_options()));
      fill(sharded, nullptr);  // The gates are 1.
      const at::NoGradGuard no_graph;
      const auto logits = [&](const Tensor& ids) {
        return sharded.run([&](auto& lm) { return lm.logits(ids.unsqueeze(0))[0]; });
      };
      const Tensor ids = random_ids(3, {12}), whole = logits(ids);
      const double scale = whole.abs().max().item<double>();
      const auto near = [&](const Tensor& got, const Tensor& expected) {
        return (got - expected).abs().max().item<double>() <= 1e-5 * scale;
      };
      const auto loss = [&](const models::CausalLmBatch& batch) {
        return sharded.run([&](auto& lm) { return lm.loss(batch); }).template item<double>();
      };
      const auto alone = [&](int64_t begin, int64_t end) {
        const Tensor part = ids.narrow(0, begin, end - begin).unsqueeze(0);
        return loss(models::make_batch(part, part));
      };
      const std::span<const int64_t> numbers(ids.const_data_ptr<int64_t>(), 12);
      const std::vector<models::DocumentSpan> documents = {{0, 0, 5}, {0, 5, 12}};
      const double packed = loss(models::make_batch(1, 12, numbers, numbers, {}, documents));
      EXPECT_NEAR(packed, alone(0, 5) + alone(5, 12), 1e-5 * packed) << kind;

      auto* prefix = dynamic_cast<lora::PrefixTuning*>(tuner.get());
      const int64_t room = 12 + (prefix ? prefix->config().num_virtual_tokens : 0);
      EXPECT_EQ(room, 12 + model->model->prefix_tokens());
      const auto cache = std::make_shared<models::KvCache>(model->config(), room, at::kFloat);
      const auto append = [&](int64_t begin, int64_t count) {
        return sharded.run(
            [&](auto& lm) { return lm.forward_cached(ids.narrow(0, begin, count), cache); });
      };
      EXPECT_TRUE(near(append(0, 6), whole[5])) << kind << ": a prompt";
      EXPECT_TRUE(near(append(6, 1), whole[6])) << kind << ": a token";
      EXPECT_TRUE(near(append(7, 4), whole[10])) << kind << ": several tokens";
      EXPECT_TRUE(near(append(11, 1), whole[11])) << kind << ": another token";
      cache->truncate(0);
      EXPECT_TRUE(near(append(0, 1), whole[0])) << kind << ": begun anew";

      if (prefix) {
        prefix->set_active(false);
      } else {
        dynamic_cast<lora::LlamaAdapter&>(*tuner).set_active(false);
      }
      const Tensor without = logits(ids);
      EXPECT_FALSE(near(without, whole)) << kind << " changes the logits";
      auto base = fully_shard(make_model(), borrow(own), prompt_options());
      fill(base, nullptr);
      EXPECT_TRUE(
          at::equal(base.run([&](auto& lm) { return lm.logits(ids.unsqueeze(0))[0]; }), without))
          << kind;
    }
  });
}

std::string refusal_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void expect_in(const std::string& part, const std::string& text) {
  EXPECT_NE(text.find(part), std::string::npos) << "'" << text << "' without '" << part << "'";
}

TEST(Prompts, GoThroughFilesAtAnyNumberOfRanks) {
  const auto folder = std::filesystem::temp_directory_path() / cat("prompts_test_", getpid());
  const std::string directory = folder.string();
  for (const std::string kind : {"prefix", "llama_adapter"}) {
    Values saved;
    run_ranks(2, [&](comm::Communicator& own) {
      Model model = make_model();
      const auto tuner = make_tuner(model, kind);
      auto sharded = fully_shard(model, borrow(own), tuner->shard_options(prompt_options()));
      fill(sharded, kind == "prefix" ? nullptr : tuner.get(), 0);
      const std::string never =
          refusal_of([&] { save_adapter(sharded.core(), *tuner, directory); });
      expect_in("has never been updated", never);
      expect_in(kind == "prefix" ? "prompt_embeddings" : ".self_attn.adaption_gate", never);
      fill(sharded, nullptr);
      save_adapter(sharded.core(), *tuner, directory);
      const Values values = values_of(sharded.core());
      if (own.rank() == 0) saved = values;
    });
    for (const int ranks : {1, 4}) {
      run_ranks(ranks, [&](comm::Communicator& own) {
        Model model = make_model();
        std::shared_ptr<lora::Tuner> tuner;
        if (kind == "prefix") {
          tuner = std::make_shared<lora::PrefixTuning>(*model, lora::read_prefix_config(directory));
        } else {
          tuner = std::make_shared<lora::LlamaAdapter>(*model,
                                                       lora::read_llama_adapter_config(directory));
        }
        auto sharded = fully_shard(model, borrow(own), tuner->shard_options(prompt_options()));
        load_adapter(sharded.core(), *tuner, directory);
        const Values loaded = values_of(sharded.core());
        ASSERT_EQ(loaded.size(), saved.size());
        for (const auto& [name, value] : saved)
          EXPECT_TRUE(at::equal(loaded.at(name), value)) << name;
      });
    }
  }
  std::filesystem::remove_all(folder);
}

// A projection is saved as the prefix that it makes, which computes the same.
TEST(Prompts, AProjectionIsSavedAsItsPrefix) {
  const auto folder = std::filesystem::temp_directory_path() / cat("projection_", getpid());
  run_ranks(2, [&](comm::Communicator& own) {
    const auto loss = [](auto& sharded) {
      const at::NoGradGuard no_graph;
      return sharded.run([&](auto& lm) { return lm.loss(batch_of(1)); }).template item<double>();
    };
    Model model = make_model();
    const auto tuner = make_tuner(model, "projection");
    auto sharded = fully_shard(model, borrow(own), tuner->shard_options(prompt_options()));
    fill(sharded, tuner.get());
    save_adapter(sharded.core(), *tuner, folder.string());
    expect_in("not the projection",
              refusal_of([&] { load_adapter(sharded.core(), *tuner, folder.string()); }));
    const lora::PrefixConfig config = lora::read_prefix_config(folder.string());
    EXPECT_TRUE(config.projected);
    Model flat = make_model();
    lora::PrefixTuning prefix(*flat, config);
    auto loaded = fully_shard(flat, borrow(own), prefix.shard_options(prompt_options()));
    fill(loaded, nullptr);
    load_adapter(loaded.core(), prefix, folder.string());
    EXPECT_EQ(loss(loaded), loss(sharded));
  });
  std::filesystem::remove_all(folder);
}

TEST(Prompts, RefuseByNameWhatChangesTheMathematicsAndWhatDoesNotFit) {
  const auto folder = std::filesystem::temp_directory_path() / cat("prompts_config_", getpid());
  std::filesystem::create_directories(folder);
  const auto refusal = [&](const std::string& type, const std::string& fields) {
    io::write_text_atomic((folder / "adapter_config.json").string(),
                          cat(R"({"peft_type": ")", type, R"(", )", fields, "}"));
    return refusal_of([&] {
      Model model = make_model();
      if (type == "PREFIX_TUNING")
        lora::PrefixTuning(*model, lora::read_prefix_config(folder.string()));
      else
        lora::LlamaAdapter(*model, lora::read_llama_adapter_config(folder.string()));
    });
  };
  const std::string prefix = R"("num_virtual_tokens": 4, )";
  EXPECT_EQ(refusal("PREFIX_TUNING", prefix + R"("token_dim": 8, "num_attention_heads": 2)"), "");
  expect_in("'modules_to_save'",
            refusal("PREFIX_TUNING", prefix + R"("modules_to_save": ["lm_head"])"));
  expect_in("'num_transformer_submodules'",
            refusal("PREFIX_TUNING", prefix + R"("num_transformer_submodules": 2)"));
  expect_in("'some_new_switch'", refusal("PREFIX_TUNING", prefix + R"("some_new_switch": true)"));
  expect_in("num_layers is 5, and the model's is 3",
            refusal("PREFIX_TUNING", prefix + R"("num_layers": 5)"));
  expect_in("token_dim", refusal("PREFIX_TUNING", prefix + R"("token_dim": 16)"));
  expect_in("num_virtual_tokens 0", refusal("PREFIX_TUNING", R"("token_dim": 8)"));
  const std::string adaption = R"("adapter_len": 4, "adapter_layers": )";
  EXPECT_EQ(refusal("ADAPTION_PROMPT", adaption + "3"), "");
  expect_in("the model has 3 layers", refusal("ADAPTION_PROMPT", adaption + "4"));
  expect_in("'target_modules'",
            refusal("ADAPTION_PROMPT", adaption + R"(2, "target_modules": "mlp")"));
  expect_in("expected ADAPTION_PROMPT", refusal("LORA", R"("r": 4)"));
  std::filesystem::remove_all(folder);

  models::LlamaConfig qwen = make_model()->config();
  qwen.qk_norm = true;
  Model model = models::make_causal_lm(qwen, at::TensorOptions(at::kMeta));
  expect_in("without norms of q and k", refusal_of([&] { make_tuner(model, "llama_adapter"); }));
  Model other = make_model();
  make_tuner(other, "prefix");
  expect_in("a prefix already", refusal_of([&] { make_tuner(other, "prefix"); }));
}

}  // namespace
}  // namespace fsdp::testing
