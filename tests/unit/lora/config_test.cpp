#include "libfsdp/lora/config.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "libfsdp/base/error.h"
#include "libfsdp/io/file.h"
#include "libfsdp/io/json.h"

namespace fsdp::lora {
namespace {

LoraConfig with_targets(std::vector<std::string> targets) {
  LoraConfig config;
  config.target_modules = std::move(targets);
  return config;
}

LoraConfig with_pattern(const std::string& pattern) {
  LoraConfig config;
  config.target_pattern = pattern;
  return config;
}

TEST(LoraConfigTest, NamesAreWholeOrTheEnd) {
  const LoraConfig config = with_targets({"q_proj", "mlp.up_proj"});
  EXPECT_TRUE(config.targets("q_proj"));
  EXPECT_TRUE(config.targets("model.layers.0.self_attn.q_proj"));
  EXPECT_TRUE(config.targets("model.layers.0.mlp.up_proj"));
  EXPECT_FALSE(config.targets("model.layers.0.self_attn.xq_proj"));
  EXPECT_FALSE(config.targets("model.layers.0.attn.up_proj"));
  EXPECT_FALSE(config.targets("model.q_proj.inner"));
}

TEST(LoraConfigTest, APatternFitsTheWholeName) {
  const LoraConfig config = with_pattern(R"(.*\.layers\.[02]\..*_proj)");
  EXPECT_TRUE(config.targets("model.layers.0.self_attn.q_proj"));
  EXPECT_FALSE(config.targets("model.layers.1.self_attn.q_proj"));
  EXPECT_FALSE(config.targets("model.layers.0.self_attn.q_proj.more"));
}

TEST(LoraConfigTest, AllLinearLeavesTheHeadOut) {
  const LoraConfig config = with_pattern(std::string(kAllLinear));
  EXPECT_TRUE(config.targets("model.layers.0.mlp.up_proj", true, false));
  EXPECT_FALSE(config.targets("lm_head", true, true));
  EXPECT_FALSE(config.targets("model.embed_tokens", false, false));
}

TEST(LoraConfigTest, ExcludedAndSavedModulesGetNoAdapter) {
  LoraConfig config = with_targets({"q_proj", "v_proj", "lm_head"});
  config.exclude_modules = {"layers.1.self_attn.q_proj"};
  config.modules_to_save = {"lm_head"};
  EXPECT_TRUE(config.targets("model.layers.0.self_attn.q_proj"));
  EXPECT_FALSE(config.targets("model.layers.1.self_attn.q_proj"));
  EXPECT_FALSE(config.targets("lm_head"));
  EXPECT_TRUE(config.saves("lm_head"));
  config.modules_to_save = {"norm"};
  EXPECT_TRUE(config.saves("model.norm"));
  EXPECT_TRUE(config.saves("model.layers.0.input_layernorm"));
  EXPECT_FALSE(config.saves("model.norm.weight"));
  config.exclude_modules.clear();
  config.exclude_pattern = R"(.*\.v_proj)";
  EXPECT_FALSE(config.targets("model.layers.0.self_attn.v_proj"));
}

TEST(LoraConfigTest, LayersAreChosenByNumber) {
  LoraConfig config = with_targets({"q_proj"});
  config.layers_to_transform = {1, 12};
  EXPECT_TRUE(config.targets("model.layers.1.self_attn.q_proj"));
  EXPECT_TRUE(config.targets("model.layers.12.self_attn.q_proj"));
  EXPECT_FALSE(config.targets("model.layers.2.self_attn.q_proj"));
  EXPECT_FALSE(config.targets("model.q_proj"));
  config.layers_pattern = {"h"};
  EXPECT_FALSE(config.targets("model.layers.1.self_attn.q_proj"));
  EXPECT_TRUE(config.targets("transformer.h.1.q_proj"));
}

TEST(LoraConfigTest, RanksAndAlphasByPattern) {
  LoraConfig config = with_targets({"q_proj", "v_proj"});
  config.r = 8;
  config.alpha = 16;
  config.rank_pattern = {{"layers.1.self_attn.q_proj", 4}, {"q_proj", 2}};
  config.alpha_pattern = {{R"(.*\.v_proj)", 24}};
  EXPECT_EQ(config.rank_of("model.layers.1.self_attn.q_proj"), 4);
  EXPECT_EQ(config.rank_of("model.layers.0.self_attn.q_proj"), 2);
  EXPECT_EQ(config.rank_of("model.layers.0.self_attn.v_proj"), 8);
  EXPECT_EQ(config.scaling_of("model.layers.0.self_attn.q_proj"), 8);
  EXPECT_EQ(config.scaling_of("model.layers.0.self_attn.v_proj"), 3);
  config.use_rslora = true;
  EXPECT_EQ(config.scaling_of("model.layers.1.self_attn.q_proj"), 8);
}

TEST(LoraConfigTest, RefusesWhatCannotWork) {
  const auto refused = [](auto change) {
    LoraConfig config = with_targets({"q_proj"});
    change(config);
    try {
      config.validate();
    } catch (const ConfigError&) {
      return true;
    }
    return false;
  };
  EXPECT_FALSE(refused([](LoraConfig&) {}));
  EXPECT_TRUE(refused([](LoraConfig& c) { c.r = 0; }));
  EXPECT_TRUE(refused([](LoraConfig& c) { c.dropout = 1; }));
  EXPECT_TRUE(refused([](LoraConfig& c) { c.target_modules.clear(); }));
  EXPECT_TRUE(refused([](LoraConfig& c) { c.target_pattern = "x"; }));
  EXPECT_TRUE(refused([](LoraConfig& c) { c.layers_pattern = {"h"}; }));
  EXPECT_TRUE(refused([](LoraConfig& c) { c.rank_pattern = {{"q", 0}}; }));
  EXPECT_TRUE(refused([](LoraConfig& c) {
    c.use_dora = true;
    c.init = Init::kPissa;
  }));
}

class AdapterConfigFile : public testing::Test {
 protected:
  AdapterConfigFile()
      : directory_(std::filesystem::temp_directory_path() / cat("lora_config_", getpid())) {
    std::filesystem::create_directories(directory_);
  }
  ~AdapterConfigFile() override { std::filesystem::remove_all(directory_); }

  LoraConfig read(const std::string& text) {
    io::write_text_atomic((directory_ / "adapter_config.json").string(), text);
    return read_adapter_config(directory_.string());
  }
  std::string refusal(const std::string& field) {
    try {
      read(cat(R"({"peft_type": "LORA", "target_modules": ["q_proj"], )", field, "}"));
    } catch (const ModelError& error) {
      return error.what();
    }
    return "";
  }
  std::filesystem::path directory_;
};

TEST_F(AdapterConfigFile, WhatIsWrittenReadsBack) {
  LoraConfig config = with_targets({"v_proj", "q_proj"});
  config.r = 16;
  config.alpha = 32.5;
  config.dropout = 0.05;
  config.use_dora = true;
  config.bias = BiasMode::kLoraOnly;
  config.modules_to_save = {"lm_head"};
  config.layers_to_transform = {0, 3};
  config.rank_pattern = {{"q_proj", 4}};
  config.alpha_pattern = {{"q_proj", 8}};
  config.base_model_name_or_path = "some/model";
  const std::string text = adapter_config_text(config);
  const LoraConfig back = read(text);
  EXPECT_EQ(adapter_config_text(back), text);
  EXPECT_EQ(back.r, 16);
  EXPECT_EQ(back.alpha, 32.5);
  EXPECT_TRUE(back.use_dora);
  EXPECT_EQ(back.bias, BiasMode::kLoraOnly);
  EXPECT_EQ(back.target_modules, (std::vector<std::string>{"q_proj", "v_proj"})) << "sorted";
  EXPECT_EQ(back.base_model_name_or_path, "some/model");
}

TEST_F(AdapterConfigFile, MissingFieldsHaveTheDefaultsOfPeft) {
  const LoraConfig config = read(R"({"peft_type": "LORA", "target_modules": "all-linear"})");
  EXPECT_EQ(config.r, 8);
  EXPECT_EQ(config.alpha, 8);
  EXPECT_EQ(config.target_pattern, "all-linear");
}

TEST_F(AdapterConfigFile, RefusesFieldsThatChangeWhatIsComputedByName) {
  for (const char* field :
       {R"("fan_in_fan_out": true)", R"("lora_bias": true)", R"("use_qalora": true)",
        R"("layer_replication": [[0, 4]])", R"("trainable_token_indices": [1])",
        R"("target_parameters": ["a"])", R"("some_new_switch": true)"}) {
    const std::string name = std::string(field).substr(1, std::string(field).find('"', 1) - 1);
    EXPECT_NE(refusal(field).find("'" + name + "'"), std::string::npos) << refusal(field);
  }
  EXPECT_NE(refusal(R"("init_lora_weights": "corda")").find("corda"), std::string::npos);
  for (const char* field : {R"("lora_bias": false)", R"("some_new_switch": null)",
                            R"("revision": "main")", R"("layer_replication": [])"})
    EXPECT_EQ(refusal(field), "") << field;
}

TEST_F(AdapterConfigFile, RefusesOtherKindsOfAdapters) {
  EXPECT_THROW(read(R"({"peft_type": "IA3", "target_modules": ["q_proj"]})"), ModelError);
  EXPECT_THROW(read(R"({"target_modules": ["q_proj"]})"), ModelError);
}

}  // namespace
}  // namespace fsdp::lora
