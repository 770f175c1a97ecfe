#include "libfsdp/io/gguf_llama.h"

#include <map>

#include "libfsdp/base/error.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/tiny_gguf.h"

namespace fsdp::io {
namespace {

TEST(GgufLlamaTest, DerivesTheConfiguration) {
  const TempDir dir;
  const auto model = GgufLlama::open(write_tiny_gguf(dir));
  const HfModelConfig& config = model.config();
  EXPECT_EQ(config.vocab_size, 5);
  EXPECT_EQ(config.hidden_size, 8);
  EXPECT_EQ(config.num_key_value_heads, 1);
  EXPECT_EQ(config.head_dim, 4);
  EXPECT_EQ(config.rms_norm_eps, 1e-5);
  EXPECT_EQ(config.rope.theta, 100000.0);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_EQ(config.eos_token_ids, std::vector<int64_t>{2});
  EXPECT_EQ(model.generation_config().dump(), R"({"_from_model_config":true,"eos_token_id":2})");
}

TEST(GgufLlamaTest, PutsTheRowsOfQueryAndKeyBack) {
  // llama.cpp stores row (half, j) of a head as row (j, half); element c of row r of the original
  // is 100 r + c.
  const TempDir dir;
  const auto model = GgufLlama::open(write_tiny_gguf(dir));
  for (const char* name : {"q_proj", "k_proj"}) {
    std::vector<float> values;
    model.read(cat("model.layers.0.self_attn.", name, ".weight"),
               [&](int64_t at, std::span<const float> part) {
                 EXPECT_EQ(at, static_cast<int64_t>(values.size()));
                 values.insert(values.end(), part.begin(), part.end());
               });
    ASSERT_EQ(values.size(), name[0] == 'q' ? 64U : 32U);
    for (size_t i = 0; i < values.size(); ++i)
      EXPECT_EQ(values[i], static_cast<float>(i / 8 * 100 + i % 8)) << i;
  }
}

TEST(GgufLlamaTest, LeavesTheOtherTensorsAsTheyAre) {
  const TempDir dir;
  const auto model = GgufLlama::open(write_tiny_gguf(dir));
  model.read("model.layers.0.self_attn.v_proj.weight", [](int64_t at, std::span<const float> part) {
    EXPECT_EQ(at, 0);
    for (size_t i = 0; i < part.size(); ++i)
      EXPECT_EQ(part[i], static_cast<float>(i / 8 * 100 + i % 8));
  });
  EXPECT_ERROR(model.read("lm_head.weight", [](int64_t, std::span<const float>) {}), InternalError,
               "has no lm_head");
}

TEST(GgufLlamaTest, NamesFollowTheLayers) {
  EXPECT_EQ(gguf_name("model.embed_tokens.weight"), "token_embd.weight");
  EXPECT_EQ(gguf_name("model.layers.12.mlp.down_proj.weight"), "blk.12.ffn_down.weight");
  EXPECT_EQ(gguf_name("model.layers.0.self_attn.q_proj.bias"), "blk.0.attn_q.bias");
  EXPECT_ERROR(gguf_name("model.layers.0.self_attn.q_norm.weight"), InternalError, "no name");
  EXPECT_ERROR(gguf_name("weight"), InternalError, "no name");
}

TEST(GgufLlamaTest, RefusesModelsThatItWouldGetWrong) {
  const TempDir dir;
  EXPECT_ERROR(GgufLlama::open(write_tiny_gguf(dir, {.architecture = "qwen2"})), ModelError,
               "architecture 'qwen2' is not supported");
  EXPECT_ERROR(GgufLlama::open(write_tiny_gguf(dir, {.extra_tensor = "rope_freqs.weight"})),
               ModelError, "rope_freqs");
  EXPECT_ERROR(
      GgufLlama::open(write_tiny_gguf(dir, {.extra_tensor = "blk.0.ffn_gate_exps.weight"})),
      ModelError, "has no place in a Llama model");
  EXPECT_ERROR(GgufLlama::open(write_tiny_gguf(dir, {.num_layers = 2})), ModelError,
               "tensor blk.1.attn_q.weight is missing");
  EXPECT_ERROR(GgufLlama::open(write_tiny_gguf(dir, {.feed_forward = 4})), ModelError,
               "tensor blk.0.ffn_gate.weight has shape [6, 8], expected [4, 8]");
}

}  // namespace
}  // namespace fsdp::io
