// What transformers and bitsandbytes write and what we write are the same bytes, and each reads the
// other's.
#include <sys/wait.h>

#include <cstdlib>
#include <memory>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/quantized_reader.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::checkpoint {
namespace {

struct Case {
  std::string name, base;
  std::optional<DType> dtype;  ///< Of the loaded model, where it is not the base's.
};
const std::vector<Case> kCases = {
    {"nf4", "base", {}},         {"nf4-nested", "base", {}},
    {"nf4-f32", "base-f32", {}}, {"nf4-converted", "base-f32", DType::kBF16},
    {"fp4-storage", "base", {}}, {"fp4-nested", "base-f32", DType::kF16},
    {"nf4-skip", "base", {}},    {"int8", "base", {}},
    {"int8-f32", "base-f32", {}}};

class QuantizedOracleTest : public ::testing::Test {
 protected:
  static int run(const std::string& command) {
    const std::string line = cat("\"" FSDP_TEST_PYTHON "\" \"" FSDP_TEST_ORACLE "\" ", command,
                                 " \"", dir_->path(), "\" >\"", *dir_ / "log", "\" 2>&1");
    const int status = std::system(line.c_str());
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  static void SetUpTestSuite() {
    dir_ = std::make_unique<io::TempDir>();
    made_ = std::filesystem::exists(FSDP_TEST_PYTHON) ? run("make") : 77;
  }
  static void TearDownTestSuite() { dir_.reset(); }
  void SetUp() override {
    if (made_ == 77) GTEST_SKIP() << "transformers, bitsandbytes or accelerate is missing";
    ASSERT_EQ(made_, 0) << io::read_text(*dir_ / "log");
  }
  static io::QuantizationConfig config_of(const Case& c) {
    const std::string path = *dir_ / c.name + "/config.json";
    return io::QuantizationConfig::from_model_config(io::Json::read(path), path).value();
  }
  static std::shared_ptr<StoredReader> open(const std::string& name) {
    return std::make_shared<StoredReader>(StoredTensors::open(*dir_ / name));
  }

  static inline std::unique_ptr<io::TempDir> dir_;
  static inline int made_ = 0;
};

TEST_F(QuantizedOracleTest, WeWriteTheFilesThatTransformersWrites) {
  for (const Case& c : kCases) {
    SCOPED_TRACE(c.name);
    const std::string ours = *dir_ / c.name + "-ours";
    std::filesystem::create_directory(ours);
    io::QuantizationConfig config = config_of(c);
    config.source = {};
    write_quantized_model(*dir_ / c.base, ours, config, c.dtype);
    for (const char* file : {"/model.safetensors", "/config.json"})
      EXPECT_TRUE(io::read_text(ours + file) == io::read_text(*dir_ / c.name + file)) << file;
  }
  EXPECT_EQ(run("check"), 0) << io::read_text(*dir_ / "log");
}

/// Ranges as ranks hold them: cut at multiples of 256 elements.
std::vector<std::pair<int64_t, int64_t>> ranges_of(const QuantizedWeight& weight) {
  std::vector<std::pair<int64_t, int64_t>> ranges = {{0, weight.numel}};
  for (int64_t cut = 256; cut < weight.numel; cut += 256 * 13) {
    ranges.emplace_back(0, cut);
    ranges.emplace_back(cut, std::min(cut + 2560, weight.numel));
    ranges.emplace_back(cut, weight.numel);
  }
  return ranges;
}

struct Range {
  std::vector<std::byte> codes;
  std::vector<float> scales;
  bool operator==(const Range&) const = default;
};
Range read(QuantizedReader& reader, const QuantizedWeight& weight, int64_t begin, int64_t end) {
  const int64_t block = weight.blocksize;
  Range range;
  range.codes.resize(static_cast<size_t>(weight.code_bytes(end - begin)));
  range.scales.resize(static_cast<size_t>((end + block - 1) / block - begin / block));
  reader.read(weight, begin, end, range.codes, range.scales);
  return range;
}

TEST_F(QuantizedOracleTest, RangesOfStoredWeightsAreThoseQuantisedOnTheWay) {
  for (const Case& c : kCases) {
    SCOPED_TRACE(c.name);
    const io::QuantizationConfig config = config_of(c);
    const QuantizeOptions options{config.kind, config.double_quant, config.storage, c.dtype};
    const auto names = linear_weight_names(
        open(c.base)->stored(), config.skip_modules.value_or(std::vector<std::string>{}));
    QuantizedReader made(open(c.base), options, names);
    QuantizedReader stored(open(c.name));
    ASSERT_EQ(stored.weights().size(), names.size());
    for (const auto& [name, weight] : stored.weights()) {
      const QuantizedWeight& other = made.weight(name);
      EXPECT_EQ(weight.shape, other.shape);
      EXPECT_EQ(weight.dtype, other.dtype);
      for (const auto& [begin, end] : ranges_of(weight))
        EXPECT_EQ(read(stored, weight, begin, end), read(made, other, begin, end)) << name;
    }
  }
}

}  // namespace
}  // namespace fsdp::checkpoint
