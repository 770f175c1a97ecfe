#include "libfsdp/checkpoint/convert_gguf.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/convert_state.h"
#include "libfsdp/checkpoint/load_state.h"
#include "tests/unit/io/tiny_gguf.h"

namespace fsdp::checkpoint {
namespace {

using io::TempDir;

/// Row 1 of q is 100, 101, ... 107 in both forms, whatever the cut.
TEST(ConvertGgufTest, WritesBothFormsThatReadBack) {
  const TempDir dir;
  const auto model =
      std::make_shared<const io::GgufLlama>(io::GgufLlama::open(io::write_tiny_gguf(dir)));
  const StateDict state = gguf_state(model);
  for (const int64_t shards : {0, 1, 3}) {
    const std::string out = dir / cat("out", shards);
    std::filesystem::create_directory(out);
    write_converted(state, {.num_shards = shards, .dtype = DType::kBF16}, out);
    for (const TensorPart& part : state.tensors) {
      std::vector<float> expected(static_cast<size_t>(part.numel)), values(expected.size());
      model->read(part.name, 0, expected);
      for (float& value : expected) value = bf16_to_float(float_to_bf16(value));
      TensorPart into = part;
      into.write = [&](int64_t at, std::span<const std::byte> from) {
        std::memcpy(values.data() + at, from.data(), from.size());
      };
      EXPECT_TRUE(
          load_state({{into}}, StoredTensors::open(out), {.strict = false}).missing.empty());
      EXPECT_EQ(values, expected) << part.name;
    }
  }
  std::vector<float> row(8);
  model->read("model.layers.0.self_attn.q_proj.weight", 8, row);
  EXPECT_EQ(row, (std::vector<float>{100, 101, 102, 103, 104, 105, 106, 107}));
}

}  // namespace
}  // namespace fsdp::checkpoint
