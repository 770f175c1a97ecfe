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
    const size_t numel = name[0] == 'q' ? 64 : 32;
    for (size_t begin = 0; begin < numel; begin += 5) {  // Within rows and over their ends.
      std::vector<float> values(std::min<size_t>(11, numel - begin));
      model.read(cat("model.layers.0.self_attn.", name, ".weight"), static_cast<int64_t>(begin),
                 values);
      for (size_t i = 0; i < values.size(); ++i)
        EXPECT_EQ(values[i], static_cast<float>((begin + i) / 8 * 100 + (begin + i) % 8)) << i;
    }
  }
}

TEST(GgufLlamaTest, LeavesTheOtherTensorsAsTheyAre) {
  const TempDir dir;
  const auto model = GgufLlama::open(write_tiny_gguf(dir));
  std::vector<float> values(20);
  model.read("model.layers.0.self_attn.v_proj.weight", 3, values);
  for (size_t i = 0; i < values.size(); ++i)
    EXPECT_EQ(values[i], static_cast<float>((i + 3) / 8 * 100 + (i + 3) % 8));
  EXPECT_ERROR(model.read("lm_head.weight", 0, values), InternalError, "has no lm_head");
  EXPECT_ERROR(model.read("model.layers.0.self_attn.q_proj.weight", 60, values), InternalError,
               "outside");
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
