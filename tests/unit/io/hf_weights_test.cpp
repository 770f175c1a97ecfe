#include "libfsdp/io/hf_weights.h"

#include <cstring>
#include <filesystem>

#include "libfsdp/base/error.h"
#include "libfsdp/io/json.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::io {
namespace {

/// Writes tensors of two U8 elements with the given names.
void write_names(const std::string& path, const std::vector<std::string>& names) {
  std::vector<TensorSpec> specs;
  for (const std::string& name : names) specs.push_back({name, DType::kU8, {2}});
  const std::vector<std::byte> bytes(2, std::byte{7});
  const std::vector<std::span<const std::byte>> data(names.size(), bytes);
  write_safetensors(path, specs, data);
}

void write_index(const TempDir& dir, const Json& weight_map) {
  dir.write("model.safetensors.index.json", Json::object({{"weight_map", weight_map}}).dump());
}

TEST(HfWeightsTest, OpensASingleFile) {
  const TempDir dir;
  write_names(dir / "model.safetensors", {"b", "a"});
  const auto weights = HfWeights::open(dir.path());
  EXPECT_EQ(weights.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(weights.find("a")->entry->bytes, 2);
  EXPECT_FALSE(weights.find("c").has_value());
}

TEST(HfWeightsTest, OpensIndexedFilesThroughLinksOfTheHubCache) {
  const TempDir dir;
  std::filesystem::create_directory(dir / "blobs");
  std::filesystem::create_directory(dir / "snapshot");
  write_names(dir / "blobs/1234", {"a", "b"});
  write_names(dir / "blobs/5678", {"c"});
  std::filesystem::create_symlink("../blobs/1234",
                                  dir / "snapshot/model-00001-of-00002.safetensors");
  std::filesystem::create_symlink("../blobs/5678",
                                  dir / "snapshot/model-00002-of-00002.safetensors");
  dir.write("snapshot/model.safetensors.index.json",
            R"({"metadata":{},"weight_map":{"a":"model-00001-of-00002.safetensors",)"
            R"("b":"model-00001-of-00002.safetensors","c":"model-00002-of-00002.safetensors"}})");
  const auto weights = HfWeights::open(dir / "snapshot");
  EXPECT_EQ(weights.files().size(), 2U);
  EXPECT_EQ(weights.find("c")->file, &weights.files()[1]);
}

TEST(HfWeightsTest, RefusesFileNamesThatLeaveTheDirectory) {
  const TempDir dir;
  write_names(dir / "a.safetensors", {"a"});
  std::filesystem::create_directory(dir / "in");
  for (const char* name : {"../a.safetensors", "/etc/a.safetensors", "in/../a.safetensors", "a.bin",
                           "..", ".safetensors", "", "a\\b.safetensors"}) {
    write_index(dir, Json::object({{"a", name}}));
    EXPECT_ERROR(HfWeights::open(dir.path()), ModelError, "expected a plain file name");
  }
}

TEST(HfWeightsTest, ListsAllMissingFiles) {
  const TempDir dir;
  write_names(dir / "b.safetensors", {"b"});
  write_index(
      dir, Json::object({{"a", "a.safetensors"}, {"b", "b.safetensors"}, {"c", "c.safetensors"}}));
  EXPECT_ERROR(HfWeights::open(dir.path()), ModelError,
               "2 listed files are missing: a.safetensors, c.safetensors");
}

TEST(HfWeightsTest, RefusesAnIndexThatDisagreesWithItsFiles) {
  const TempDir dir;
  write_names(dir / "a.safetensors", {"a"});
  write_names(dir / "b.safetensors", {"b"});
  write_index(dir, Json::object({{"a", "b.safetensors"}, {"b", "a.safetensors"}}));
  EXPECT_ERROR(HfWeights::open(dir.path()), ModelError, "tensor 'a' is not in b.safetensors");
  write_names(dir / "b.safetensors", {"b", "a"});
  write_index(dir, Json::object({{"a", "a.safetensors"}, {"b", "b.safetensors"}}));
  EXPECT_ERROR(HfWeights::open(dir.path()), ModelError, "tensor 'a' is in two files");
  dir.write("model.safetensors.index.json",
            R"({"weight_map":{"a":"a.safetensors","a":"b.safetensors"}})");
  EXPECT_ERROR(HfWeights::open(dir.path()), ModelError, "\"a\" occurs twice");
  dir.write("model.safetensors.index.json", R"({"weight_map":[]})");
  EXPECT_ERROR(HfWeights::open(dir.path()), ModelError, "index.json: expected an object");
}

TEST(HfWeightsTest, NeverReadsPickles) {
  const TempDir dir;
  EXPECT_ERROR(HfWeights::open(dir.path()), ModelError, "neither model.safetensors nor");
  dir.write("pytorch_model.bin", "x");
  EXPECT_ERROR(HfWeights::open(dir.path()), ModelError, "pytorch_model.bin is a pickle");
  EXPECT_ERROR(HfWeights::open(dir / "nowhere"), ModelError, "no such directory");
}

TEST(HfWritePlanTest, OneFileNeedsNoIndex) {
  const std::vector<TensorSpec> specs = {{"a", DType::kF32, {4}}, {"b", DType::kF32, {4}}};
  const auto plan = plan_hf_files(specs);
  ASSERT_EQ(plan.files.size(), 1U);
  EXPECT_EQ(plan.files[0].name, "model.safetensors");
  EXPECT_EQ(plan.index_json, "");
  EXPECT_EQ(plan.total_bytes, 32);
}

TEST(HfWritePlanTest, SplitsInOrderAndGivesTheHugeTensorItsOwnFile) {
  const std::vector<TensorSpec> specs = {{"a", DType::kF32, {10}},
                                         {"huge", DType::kF32, {99}},
                                         {"b", DType::kF32, {15}},
                                         {"c", DType::kF32, {1}}};
  const auto plan = plan_hf_files(specs, 100);
  ASSERT_EQ(plan.files.size(), 3U);
  EXPECT_EQ(plan.places[1].file, 0U);  // The hub puts it before the file that was being filled.
  EXPECT_EQ(plan.places[0].file, 1U);
  EXPECT_EQ(plan.places[2].file, 1U);
  EXPECT_EQ(plan.places[3].file, 2U);
  const Json index = Json::parse(plan.index_json, "index");
  EXPECT_EQ(index["metadata"]["total_size"].as_int(), 500);
  EXPECT_EQ(index["metadata"]["total_parameters"].as_int(), 125);
  EXPECT_EQ(index["weight_map"]["c"].as_string(), "model-00003-of-00003.safetensors");
  for (size_t i = 0; i < specs.size(); ++i) {
    EXPECT_EQ(plan.files[plan.places[i].file].layout.entries[plan.places[i].entry].name,
              specs[i].name);
  }
}

TEST(HfWritePlanTest, ParsesDecimalSizes) {
  EXPECT_EQ(parse_bytes("5GB"), 5'000'000'000);
  EXPECT_EQ(parse_bytes("1.5mb"), 1'500'000);
  EXPECT_EQ(parse_bytes("123"), 123);
  for (const char* bad : {"", "GB", "5GiB", "-1GB", "5 GB x", "nan", "1e30TB", "0"}) {
    EXPECT_ERROR(parse_bytes(bad), ConfigError, "is not understood");
  }
}

TEST(HfWritePlanTest, KnowsTheFilesThatASaveReplaces) {
  EXPECT_TRUE(is_hf_weights_file("model.safetensors"));
  EXPECT_TRUE(is_hf_weights_file("model-00001-of-00012.safetensors"));
  EXPECT_TRUE(is_hf_weights_file("model.safetensors.index.json"));
  EXPECT_FALSE(is_hf_weights_file("adapter_model.safetensors"));
  EXPECT_FALSE(is_hf_weights_file("model-0001-of-00012.safetensors"));
  EXPECT_FALSE(is_hf_weights_file("model-00001-of-00012.safetensors.bak"));
}

}  // namespace
}  // namespace fsdp::io
