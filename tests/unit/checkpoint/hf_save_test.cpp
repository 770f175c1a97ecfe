#include <algorithm>
#include <filesystem>
#include <numeric>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/slice_io.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::checkpoint {
namespace {

using io::TempDir;

const std::vector<io::NamedShape> kTensors = {
    {"w", {5, 7}}, {"b", {5}}, {"empty", {0, 3}}, {"z", {11}}};

std::vector<float> values_of(size_t t) {
  const auto& shape = kTensors[t].shape;
  std::vector<float> values(static_cast<size_t>(
      std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>())));
  std::iota(values.begin(), values.end(), 1000.0F * static_cast<float>(t) + 0.1F);
  return values;
}

/// The slices of rank r of 3, cut anywhere: the parameters lie end to end and are cut evenly.
void write_rank(HfSave& save, int64_t rank) {
  int64_t total = 0, at = 0;
  for (size_t t = 0; t < kTensors.size(); ++t) total += static_cast<int64_t>(values_of(t).size());
  const int64_t begin = total * rank / 3, end = total * (rank + 1) / 3;
  for (size_t t = 0; t < kTensors.size(); ++t) {
    const std::vector<float> values = values_of(t);
    const auto numel = static_cast<int64_t>(values.size());
    const int64_t from = std::clamp<int64_t>(begin - at, 0, numel),
                  to = std::clamp<int64_t>(end - at, 0, numel);
    const auto part =
        std::span(values).subspan(static_cast<size_t>(from), static_cast<size_t>(to - from));
    save.write({kTensors[t].name, from, to - from, 0}, part);
    at += numel;
  }
}

void save_with_three_ranks(const std::string& directory, DType dtype, int64_t max_shard_bytes) {
  HfSave rank0(directory, kTensors, dtype, max_shard_bytes),
      rank1(directory, kTensors, dtype, max_shard_bytes),
      rank2(directory, kTensors, dtype, max_shard_bytes);
  rank0.create();
  write_rank(rank2, 2);
  write_rank(rank0, 0);
  write_rank(rank1, 1);
  EXPECT_EQ(rank0.written_numel() + rank1.written_numel() + rank2.written_numel(),
            rank0.total_numel());
  rank0.commit();
}

TEST(HfSaveTest, ThreeRanksWriteTheSameBytesAsOneWriter) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const TempDir dir;
    save_with_three_ranks(dir.path(), dtype, io::kDefaultMaxShardBytes);
    EXPECT_EQ(dir.num_files(), 1U);
    std::vector<io::TensorSpec> specs;
    std::vector<std::vector<std::byte>> bytes;
    for (size_t t = 0; t < kTensors.size(); ++t) {
      const auto values = values_of(t);
      specs.push_back({kTensors[t].name, dtype, kTensors[t].shape});
      bytes.emplace_back(values.size() * dtype_bytes(dtype));
      convert_floats(values.data(), DType::kF32, bytes.back().data(), dtype, values.size());
    }
    const std::vector<std::span<const std::byte>> data(bytes.begin(), bytes.end());
    io::write_safetensors(dir / "whole", specs, data);
    EXPECT_EQ(io::read_text(dir / "model.safetensors"), io::read_text(dir / "whole"));
  }
}

TEST(HfSaveTest, SeveralFilesReadBackThroughTheirIndex) {
  const TempDir dir;
  save_with_three_ranks(dir.path(), DType::kF32, 100);
  const auto weights = io::HfWeights::open(dir.path());
  EXPECT_EQ(weights.files().size(), 2U);
  check_names(weights, kTensors);
  std::vector<TensorSlice> slices;
  for (size_t t = 0; t < kTensors.size(); ++t) {
    slices.push_back(
        {kTensors[t].name, 0, static_cast<int64_t>(values_of(t).size()), static_cast<int64_t>(t)});
  }
  size_t seen = 0;
  load_slices(weights, slices,
              [&](const TensorSlice& slice, int64_t offset, std::span<const float> values) {
                EXPECT_EQ(offset, 0);
                EXPECT_EQ(std::vector<float>(values.begin(), values.end()),
                          values_of(static_cast<size_t>(slice.shard_at)));
                ++seen;
              });
  EXPECT_EQ(seen, 3U);  // Not the empty one.
}

TEST(HfSaveTest, RemovesFilesOfAnOlderSaveAndNothingElse) {
  const TempDir dir;
  dir.write("config.json", "{}");
  dir.write("adapter_model.safetensors", "x");
  dir.write("model-00007-of-00009.safetensors", "x");
  save_with_three_ranks(dir.path(), DType::kF32, io::kDefaultMaxShardBytes);
  EXPECT_EQ(dir.num_files(), 3U);
  save_with_three_ranks(dir.path(), DType::kF32, 100);
  EXPECT_FALSE(std::filesystem::exists(dir / "model.safetensors"));
  EXPECT_EQ(dir.num_files(), 5U);
  save_with_three_ranks(dir.path(), DType::kF32, 100);
  EXPECT_EQ(io::HfWeights::open(dir.path()).names().size(), kTensors.size());
  save_with_three_ranks(dir.path(), DType::kF32, io::kDefaultMaxShardBytes);
  EXPECT_FALSE(std::filesystem::exists(dir / "model.safetensors.index.json"));
  EXPECT_EQ(dir.num_files(), 3U);
}

TEST(HfSaveTest, WithoutCommitTheOldModelStaysAndTemporariesGo) {
  const TempDir dir;
  save_with_three_ranks(dir.path(), DType::kF32, io::kDefaultMaxShardBytes);
  const std::string old = io::read_text(dir / "model.safetensors");
  {
    HfSave save(dir.path(), kTensors, DType::kBF16);
    save.create();
    write_rank(save, 0);
    EXPECT_EQ(dir.num_files(), 2U);
    EXPECT_EQ(io::read_text(dir / "model.safetensors"), old);
  }
  EXPECT_EQ(dir.num_files(), 1U);
  EXPECT_EQ(io::read_text(dir / "model.safetensors"), old);
}

TEST(HfSaveTest, LeftoversOfAKilledSaveAreReplaced) {
  const TempDir dir;
  dir.write("model.safetensors.tmp-save", std::string(100'000, 'x'));
  save_with_three_ranks(dir.path(), DType::kF32, io::kDefaultMaxShardBytes);
  EXPECT_EQ(io::HfWeights::open(dir.path()).names().size(), kTensors.size());
}

TEST(HfSaveTest, RefusesSlicesOutsideAndUnwritableDirectories) {
  const TempDir dir;
  HfSave save(dir.path(), kTensors, DType::kF32);
  save.create();
  const std::vector<float> values(3);
  EXPECT_ERROR(save.write({"nope", 0, 3, 0}, values), InternalError, "no tensor is named 'nope'");
  EXPECT_ERROR(save.write({"b", 3, 3, 0}, values), InternalError, "lies outside");
  EXPECT_ERROR(save.write({"b", 0, 2, 0}, values), InternalError, "another size");
  HfSave nowhere(dir / "absent", kTensors, DType::kF32);
  EXPECT_ERROR(nowhere.create(), ConfigError, "cannot open for writing: No such file");
}

}  // namespace
}  // namespace fsdp::checkpoint
