#include "libfsdp/checkpoint/convert_gguf.h"

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/slice_io.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/tiny_gguf.h"

namespace fsdp::checkpoint {
namespace {

using io::TempDir;

TEST(ConvertGgufTest, WritesADirectoryThatReadsBack) {
  const TempDir dir;
  const auto model = io::GgufLlama::open(io::write_tiny_gguf(dir));
  convert_gguf(model, dir / "a/out", DType::kBF16);
  const auto config = io::HfModelConfig::read(dir / "a/out");
  EXPECT_EQ(config.dtype, DType::kBF16);
  const auto weights = io::HfWeights::open(dir / "a/out");
  check_names(weights, config.expected_tensors());
  const TensorSlice row{"model.layers.0.self_attn.q_proj.weight", 8, 8, 0};
  load_slices(weights, std::span(&row, 1),
              [](const TensorSlice&, int64_t, std::span<const float> values) {
                for (size_t i = 0; i < values.size(); ++i)
                  EXPECT_EQ(values[i], bf16_to_float(float_to_bf16(100.0F + i)));
              });
  EXPECT_EQ(io::Json::read(dir / "a/out/generation_config.json")["eos_token_id"].as_int(), 2);
}

TEST(ConvertGgufTest, RefusesADirectoryThatCannotBeMade) {
  const TempDir dir;
  const auto model = io::GgufLlama::open(io::write_tiny_gguf(dir));
  EXPECT_ERROR(convert_gguf(model, dir / "tiny.gguf/x", DType::kF32), ConfigError,
               "cannot make the directory");
}

}  // namespace
}  // namespace fsdp::checkpoint
