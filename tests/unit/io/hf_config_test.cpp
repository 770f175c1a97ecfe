#include "libfsdp/io/hf_config.h"

#include "libfsdp/base/error.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::io {
namespace {

Json llama_json(std::string_view model_type = "llama") {
  return Json::object({{"model_type", model_type},
                       {"vocab_size", 100},
                       {"hidden_size", 24},
                       {"intermediate_size", 40},
                       {"num_hidden_layers", 2},
                       {"num_attention_heads", 4},
                       {"num_key_value_heads", 2}});
}

HfModelConfig parse(const Json& json) { return HfModelConfig::from_json(json, "config.json"); }

HfModelConfig with(std::string_view key, Json value, std::string_view model_type = "llama") {
  Json json = llama_json(model_type);
  json[key] = std::move(value);
  return parse(json);
}

TEST(HfConfigTest, FillsTheDefaultsOfLlama) {
  const auto config = parse(llama_json());
  EXPECT_EQ(config.head_dim, 6);
  EXPECT_EQ(config.max_position_embeddings, 2048);
  EXPECT_EQ(config.rms_norm_eps, 1e-6);
  EXPECT_EQ(config.rope.theta, 10000.0);
  EXPECT_EQ(config.eos_token_ids, std::vector<int64_t>{2});
  EXPECT_EQ(config.bos_token_id, 1);
  EXPECT_FALSE(config.tie_word_embeddings || config.qkv_bias || config.o_bias || config.mlp_bias ||
               config.qk_norm);
  EXPECT_FALSE(config.sliding_window || config.dtype || config.pad_token_id);
}

TEST(HfConfigTest, KnowsWhatDiffersBetweenTheTypes) {
  EXPECT_TRUE(parse(llama_json("qwen2")).qkv_bias);
  EXPECT_FALSE(parse(llama_json("qwen2")).o_bias);
  EXPECT_TRUE(parse(llama_json("qwen3")).qk_norm);
  EXPECT_EQ(parse(llama_json("qwen3")).head_dim, 128);
  EXPECT_EQ(parse(llama_json("mistral")).head_dim, 6);
  EXPECT_TRUE(with("attention_bias", true).o_bias);
  EXPECT_TRUE(with("mlp_bias", true).mlp_bias);
  EXPECT_EQ(with("num_key_value_heads", nullptr).num_key_value_heads, 4);
  EXPECT_EQ(with("head_dim", 8).head_dim, 8);
  EXPECT_EQ(with("head_dim", nullptr).head_dim, 6);
  EXPECT_EQ(with("eos_token_id", Json::array({5, 6})).eos_token_ids, (std::vector<int64_t>{5, 6}));
  EXPECT_TRUE(with("eos_token_id", nullptr).eos_token_ids.empty());
  EXPECT_FALSE(with("pad_token_id", -1).pad_token_id.has_value());
  Json mistral = llama_json("mistral");
  mistral["num_attention_heads"] = 8;
  mistral["head_dim"] = 4;
  mistral.erase("num_key_value_heads");
  EXPECT_EQ(parse(mistral).num_key_value_heads, 8);
}

TEST(HfConfigTest, ReadsRopeOfBothGenerations) {
  Json llama3 = Json::object({{"factor", 32.0},
                              {"high_freq_factor", 4.0},
                              {"low_freq_factor", 1.0},
                              {"original_max_position_embeddings", 8192},
                              {"rope_type", "llama3"}});
  Json older = llama_json();
  older["rope_theta"] = 500000.0;
  older["rope_scaling"] = llama3;
  Json newer = llama_json();
  llama3["rope_theta"] = 500000.0;
  newer["rope_parameters"] = llama3;
  for (const Json& json : {older, newer}) {
    const RopeConfig rope = parse(json).rope;
    EXPECT_EQ(rope.type, RopeConfig::Type::kLlama3);
    EXPECT_EQ(rope.theta, 500000.0);
    EXPECT_EQ(rope.factor, 32.0);
    EXPECT_EQ(rope.high_freq_factor, 4.0);
    EXPECT_EQ(rope.original_max_position_embeddings, 8192);
  }
  const Json linear = Json::object({{"type", "linear"}, {"factor", 2}});
  EXPECT_EQ(with("rope_scaling", linear).rope.type, RopeConfig::Type::kLinear);
  EXPECT_EQ(with("rope_scaling", nullptr).rope.type, RopeConfig::Type::kDefault);
  EXPECT_EQ(with("rope_theta", 1000000).rope.theta, 1e6);
}

TEST(HfConfigTest, RefusesRopeThatItCannotCompute) {
  EXPECT_ERROR(with("rope_scaling", Json::object({{"rope_type", "yarn"}, {"factor", 4}})),
               ModelError, "rope type 'yarn' is not supported, expected default, linear or llama3");
  EXPECT_ERROR(with("rope_scaling", Json::object({{"rope_type", "linear"}})), ModelError,
               "\"factor\" is missing");
  EXPECT_ERROR(with("rope_scaling", Json::object({{"rope_type", "linear"}, {"factor", 0}})),
               ModelError, "expected a positive number");
  EXPECT_ERROR(with("partial_rotary_factor", 0.5), ModelError, "partial_rotary_factor");
}

TEST(HfConfigTest, ExposesAWindowOnlyWhereItIsActive) {
  EXPECT_EQ(parse(llama_json("mistral")).sliding_window, 4096);
  EXPECT_FALSE(with("sliding_window", nullptr, "mistral").sliding_window.has_value());
  EXPECT_FALSE(with("sliding_window", 16, "qwen2").sliding_window.has_value());
  Json qwen = llama_json("qwen2");
  qwen["use_sliding_window"] = true;
  qwen["sliding_window"] = 16;
  EXPECT_EQ(parse(qwen).sliding_window, 16);
  qwen["layer_types"] = Json::array({"full_attention", "full_attention"});
  EXPECT_FALSE(parse(qwen).sliding_window.has_value());
  const auto config = with("sliding_window", 16, "mistral");
  config.check_context(16);
  EXPECT_ERROR(config.check_context(17), ConfigError, "a context of 17 tokens is longer than");
}

TEST(HfConfigTest, BoundsAndChecksEverySize) {
  EXPECT_ERROR(with("model_type", "gpt2"), ModelError,
               "config.json: model_type 'gpt2' is not supported");
  EXPECT_ERROR(with("hidden_act", "gelu"), ModelError, "'gelu' is not supported");
  EXPECT_ERROR(with("vocab_size", 0), ModelError, "'vocab_size': got 0, expected 1 to");
  EXPECT_ERROR(with("vocab_size", int64_t{1} << 40), ModelError, "'vocab_size': got 1099511627776");
  EXPECT_ERROR(with("num_hidden_layers", -1), ModelError, "'num_hidden_layers': got -1");
  EXPECT_ERROR(with("hidden_size", 24.0), ModelError, "'hidden_size': expected an integer");
  EXPECT_ERROR(with("num_key_value_heads", 3), ModelError, "does not divide");
  EXPECT_ERROR(with("num_attention_heads", 5), ModelError, "does not divide");
  EXPECT_ERROR(with("hidden_size", 26), ModelError, "is not a multiple");
  EXPECT_ERROR(with("head_dim", 5), ModelError, "is odd");
  EXPECT_ERROR(with("rms_norm_eps", 0), ModelError, "expected a positive number");
  EXPECT_ERROR(with("torch_dtype", "int8"), ModelError, "'dtype': got 'int8'");
  EXPECT_ERROR(with("quantization_config", Json::object()), ModelError,
               "config.json: 'quantization_config': expected one of 'load_in_4bit'");
  EXPECT_ERROR(with("eos_token_id", "x"), ModelError, "'eos_token_id': expected an integer");
  EXPECT_ERROR(with("layer_types", Json::array({"linear_attention"})), ModelError, "not supported");
  EXPECT_ERROR(parse(Json::array()), ModelError, "expected an object");
}

TEST(HfConfigTest, SavesBothSpellingsAndKeepsTheRest) {
  Json json = llama_json();
  json["my_own_key"] = Json::parse("[1e-05]", "");
  json["torch_dtype"] = "float32";
  const auto config = parse(json);
  EXPECT_EQ(config.dtype, DType::kF32);
  const Json saved = config.to_json(DType::kBF16);
  EXPECT_EQ(saved["my_own_key"].dump(), "[1e-05]");
  EXPECT_EQ(saved["dtype"].as_string(), "bfloat16");
  EXPECT_EQ(saved["torch_dtype"].as_string(), "bfloat16");
  EXPECT_EQ(saved["rope_theta"].as_double(), 10000.0);
  EXPECT_TRUE(saved["rope_scaling"].is_null());
  EXPECT_EQ(saved["rope_parameters"]["rope_type"].as_string(), "default");
  EXPECT_EQ(parse(saved).to_json(DType::kBF16), saved);
}

TEST(HfConfigTest, ListsTensorsInTheOrderOfTheStateDict) {
  const auto tensors = parse(llama_json("qwen2")).expected_tensors();
  EXPECT_EQ(tensors.size(), 1U + 2 * 12 + 2);
  EXPECT_EQ(tensors[1].name, "model.layers.0.self_attn.q_proj.weight");
  EXPECT_EQ(tensors[1].shape, (std::vector<int64_t>{24, 24}));
  EXPECT_EQ(tensors[4].name, "model.layers.0.self_attn.k_proj.bias");
  EXPECT_EQ(tensors[4].shape, (std::vector<int64_t>{12}));
  EXPECT_EQ(tensors.back().name, "lm_head.weight");
  EXPECT_EQ(with("tie_word_embeddings", true).expected_tensors().back().name, "model.norm.weight");
}

TEST(HfConfigTest, ReadNamesTheFileAndTheKey) {
  const TempDir dir;
  dir.write("config.json", R"({"model_type":"llama"})");
  EXPECT_ERROR(HfModelConfig::read(dir.path()), ModelError,
               "/config.json: key \"vocab_size\" is missing");
}

}  // namespace
}  // namespace fsdp::io
