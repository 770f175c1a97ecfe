#include <rapidcheck.h>

#include <numeric>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/slice_io.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::checkpoint {
namespace {

using io::TempDir;

/// A model whose element i of tensor t is 20 t + i (exact in bf16), each tensor in a type of its
/// own.
struct Model {
  TempDir dir;
  std::vector<io::TensorSpec> specs = {{"a", DType::kF32, {3, 4}},
                                       {"b", DType::kBF16, {7}},
                                       {"c", DType::kF16, {2, 5}},
                                       {"d", DType::kBF16, {9}},
                                       {"e", DType::kF64, {3}}};
  Model() {
    std::vector<std::vector<std::byte>> bytes;
    for (size_t t = 0; t < specs.size(); ++t) {
      std::vector<float> values(numel(t));
      std::iota(values.begin(), values.end(), 20.0F * static_cast<float>(t));
      bytes.emplace_back(values.size() * dtype_bytes(specs[t].dtype));
      convert_floats(values.data(), DType::kF32, bytes.back().data(), specs[t].dtype,
                     values.size());
    }
    const std::vector<std::span<const std::byte>> data(bytes.begin(), bytes.end());
    io::write_safetensors(dir / "model.safetensors", specs, data);
  }
  size_t numel(size_t t) const {
    const auto& shape = specs[t].shape;
    return static_cast<size_t>(
        std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>()));
  }
};

TEST(LoadSlicesTest, BringsEveryElementOfEverySliceOnceAtAnyChunkSize) {
  const Model model;
  const auto weights = io::HfWeights::open(model.dir.path());
  EXPECT_TRUE(rc::check([&] {
    // Random cuts of all tensors, of which some are asked for.
    std::vector<TensorSlice> slices;
    int64_t shard_at = 0;
    for (size_t t = 0; t < model.specs.size(); ++t) {
      const auto total = static_cast<int64_t>(model.numel(t));
      for (int64_t at = 0; at < total;) {
        const auto numel = *rc::gen::inRange<int64_t>(0, total - at + 1);
        if (*rc::gen::arbitrary<bool>()) {
          slices.push_back({model.specs[t].name, at, numel, shard_at});
          shard_at += numel;
        }
        at += std::max<int64_t>(numel, 1);
      }
    }
    std::vector<float> shard(static_cast<size_t>(shard_at), -1.0F);
    int64_t delivered = 0;
    load_slices(
        weights, slices,
        [&](const TensorSlice& slice, int64_t offset, std::span<const float> values) {
          std::copy(values.begin(), values.end(), shard.begin() + slice.shard_at + offset);
          delivered += static_cast<int64_t>(values.size());
        },
        *rc::gen::inRange<int64_t>(1, 60));
    RC_ASSERT(delivered == shard_at);
    for (const TensorSlice& slice : slices) {
      for (int64_t i = 0; i < slice.numel; ++i) {
        const auto expected = static_cast<float>(20 * (slice.name[0] - 'a') + slice.param_at + i);
        RC_ASSERT(shard[static_cast<size_t>(slice.shard_at + i)] == expected);
      }
    }
  }));
}

TEST(LoadSlicesTest, RefusesUnknownTensorsIntegersAndRangesOutside) {
  const Model model;
  const auto weights = io::HfWeights::open(model.dir.path());
  const SliceSink sink = [](const TensorSlice&, int64_t, std::span<const float>) {};
  const auto load = [&](const TensorSlice& slice) {
    load_slices(weights, std::span(&slice, 1), sink);
  };
  EXPECT_ERROR(load({"nope", 0, 1, 0}), ModelError, "'nope' is not in the model's files");
  EXPECT_ERROR(load({"b", 5, 3, 0}), InternalError, "slice of 'b' lies outside");
  EXPECT_ERROR(load({"b", -1, 1, 0}), InternalError, "slice of 'b' lies outside");
  const TempDir dir;
  const std::vector<io::TensorSpec> specs = {{"i", DType::kI32, {1}}};
  const std::vector<std::byte> bytes(4);
  const std::vector<std::span<const std::byte>> data = {bytes};
  io::write_safetensors(dir / "model.safetensors", specs, data);
  const TensorSlice slice{"i", 0, 1, 0};
  EXPECT_ERROR(load_slices(io::HfWeights::open(dir.path()), std::span(&slice, 1), sink), ModelError,
               "1 tensors of another type: i I32 instead of float32");
}

TEST(CheckNamesTest, ListsEverythingThatIsWrongAtOnce) {
  const Model model;
  const auto weights = io::HfWeights::open(model.dir.path());
  std::vector<io::NamedShape> expected;
  for (const auto& spec : model.specs) expected.push_back({spec.name, spec.shape});
  check_names(weights, expected);
  expected[0].shape = {4, 3};
  expected[1].name = "z";
  const auto check = [&] { check_names(weights, expected); };
  EXPECT_ERROR(check(), ModelError,
               "\n  1 missing tensors: z\n  1 unexpected tensors: b"
               "\n  1 tensors of another shape: a [3, 4] instead of [4, 3]");
  expected[0].shape = {3, 4};
  expected[1].name = "b";
  for (int i = 0; i < 9; ++i) expected.push_back({cat("x", i), {1}});
  EXPECT_ERROR(check(), ModelError, "9 missing tensors: x0, x1, x2, x3, x4, and 4 more");
}

TEST(CheckNamesTest, IgnoresTiedAliasesAndOldRotaryBuffers) {
  const TempDir dir;
  const std::vector<io::TensorSpec> specs = {
      {"embed", DType::kF32, {1}},
      {"lm_head.weight", DType::kF32, {1}},
      {"model.layers.0.self_attn.rotary_emb.inv_freq", DType::kF32, {1}}};
  const std::vector<std::byte> bytes(4);
  const std::vector<std::span<const std::byte>> data(3, bytes);
  io::write_safetensors(dir / "model.safetensors", specs, data);
  const auto weights = io::HfWeights::open(dir.path());
  const std::vector<io::NamedShape> expected = {{"embed", {1}}};
  const std::vector<std::string> aliases = {"lm_head.weight"};
  check_names(weights, expected, aliases);
  EXPECT_ERROR(check_names(weights, expected), ModelError, "1 unexpected tensors: lm_head.weight");
}

}  // namespace
}  // namespace fsdp::checkpoint
