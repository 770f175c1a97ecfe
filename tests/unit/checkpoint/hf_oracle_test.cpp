// Both ways against the Python packages: they write and we read, we write and they read.
#include <cstdlib>
#include <filesystem>
#include <numeric>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/convert_state.h"
#include "libfsdp/checkpoint/slice_io.h"
#include "libfsdp/io/hf_config.h"
#include "tests/unit/checkpoint/memory_state.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::checkpoint {
namespace {

using io::TempDir;

const std::vector<std::string> kCases = {"llama",   "llama_biased", "llama_linear",
                                         "mistral", "qwen2",        "qwen3"};

class HfOracleTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(FSDP_TEST_PYTHON))
      GTEST_SKIP() << "no Python at " FSDP_TEST_PYTHON;
    run("make");
  }
  void run(const std::string& command) {
    const std::string line = cat("\"" FSDP_TEST_PYTHON "\" \"" FSDP_TEST_ORACLE "\" ", command,
                                 " \"", dir_.path(), "\"");
    ASSERT_EQ(std::system(line.c_str()), 0) << line;
  }
  const TempDir dir_;
};

/// Sum of a tensor's elements, read in small chunks.
double sum_of(const io::HfWeights& weights, const io::NamedShape& tensor) {
  const int64_t numel = weights.find(tensor.name)->entry->numel;
  const std::vector<TensorSlice> halves = {{tensor.name, 0, numel / 2, 0},
                                           {tensor.name, numel / 2, numel - numel / 2, 0}};
  double sum = 0;
  load_slices(
      weights, halves,
      [&](const TensorSlice&, int64_t, std::span<const float> values) {
        sum = std::accumulate(values.begin(), values.end(), sum);
      },
      100);
  return sum;
}

void write_config(const std::string& directory, const io::HfModelConfig& config) {
  std::filesystem::create_directories(directory);
  io::write_text_atomic(directory + "/config.json", config.to_json(DType::kF16).dump(2));
}

void save_eighths(const std::string& directory, std::span<const io::NamedShape> tensors) {
  std::filesystem::create_directories(directory);
  MemoryState state;
  for (const io::NamedShape& tensor : tensors) {
    state.add(tensor.name, DType::kF32, tensor.shape);
    std::vector<float> values(static_cast<size_t>(state.tensors.back().numel()));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i) / 8;
    std::memcpy(state.tensors.back().bytes.data(), values.data(),
                state.tensors.back().bytes.size());
  }
  write_converted(state.state(0, 1), {.dtype = DType::kBF16, .max_file_bytes = 20'000}, directory);
}

/// Our plan for the same tensors names the same files with the same first bytes.
void expect_same_split(const std::string& directory, std::span<const io::NamedShape> tensors) {
  std::vector<io::TensorSpec> specs;
  for (const io::NamedShape& tensor : tensors)
    specs.push_back({tensor.name, DType::kBF16, tensor.shape});
  const auto plan = io::plan_hf_files(specs, 20'000);
  EXPECT_EQ(io::Json::parse(plan.index_json, "plan")["weight_map"],
            io::Json::read(directory + "/model.safetensors.index.json")["weight_map"]);
  for (const auto& file : plan.files) {
    const std::string written = io::read_text(directory + "/" + file.name);
    EXPECT_EQ(written.substr(0, file.layout.header.size()), file.layout.header);
    EXPECT_EQ(static_cast<int64_t>(written.size()), file.layout.file_bytes);
  }
}

TEST_F(HfOracleTest, ReadsModelsThatTransformersWroteAndPlansTheSameFiles) {
  const auto types = io::SafetensorsFile::open(dir_ / "types.safetensors");
  for (const char* name : {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16",
                           "int8", "uint8", "bool"}) {
    const io::TensorEntry* entry = types.find(cat("t.", name));
    ASSERT_NE(entry, nullptr);
    EXPECT_EQ(entry->dtype, dtype_from_name(name));
    EXPECT_EQ(entry->shape, (std::vector<int64_t>{3, 4}));
    std::vector<std::byte> bytes(static_cast<size_t>(entry->bytes));
    types.read(*entry, 0, bytes);
  }
  for (const std::string& name : kCases) {
    SCOPED_TRACE(name);
    const auto config = io::HfModelConfig::read(dir_ / name);
    const auto weights = io::HfWeights::open(dir_ / name);
    EXPECT_GT(weights.files().size(), 1U);
    check_names(weights, config.expected_tensors());
    expect_same_split(dir_ / name, config.expected_tensors());
    const io::Json sums = io::Json::read(dir_ / (name + "/sums.json"));
    for (const io::NamedShape& tensor : config.expected_tensors()) {
      EXPECT_NEAR(sum_of(weights, tensor), sums.get<double>(tensor.name), 1e-3) << tensor.name;
    }
  }
}

TEST_F(HfOracleTest, PythonReadsWhatWeWrite) {
  for (const std::string& name : kCases)
    write_config(dir_ / ("config/" + name), io::HfModelConfig::read(dir_ / name));
  save_eighths(dir_ / "save", io::HfModelConfig::read(dir_ / "qwen2").expected_tensors());
  run("check");
}

}  // namespace
}  // namespace fsdp::checkpoint
