// Files that PyTorch wrote as pickles, read as data.
#include <cstdlib>
#include <filesystem>
#include <memory>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/load_state.h"
#include "libfsdp/checkpoint/torch_files.h"
#include "tests/unit/checkpoint/memory_state.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::checkpoint {
namespace {

using io::TempDir;

class TorchOracleTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    dir_ = std::make_unique<TempDir>();
    const std::string line =
        cat("\"" FSDP_TEST_PYTHON "\" \"" FSDP_TEST_ORACLE "\" \"", dir_->path(), "\"");
    made_ = std::filesystem::exists(FSDP_TEST_PYTHON) && std::system(line.c_str()) == 0;
  }
  static void TearDownTestSuite() { dir_.reset(); }
  void SetUp() override {
    if (!std::filesystem::exists(FSDP_TEST_PYTHON))
      GTEST_SKIP() << "no Python at " FSDP_TEST_PYTHON;
    ASSERT_TRUE(made_);
  }
  static std::unique_ptr<TempDir> dir_;
  static bool made_;
};

std::unique_ptr<TempDir> TorchOracleTest::dir_;
bool TorchOracleTest::made_ = false;

MemoryState read_all(const StoredTensors& stored) {
  MemoryState memory;
  for (const auto& [name, tensor] : stored.tensors())
    memory.add(name, tensor.dtype.value(), tensor.shape);
  load_state(memory.state(0, 1), stored, {.buffer_bytes = 5000});
  return memory;
}

/// Every tensor of `expected` is in `got`, byte for byte.
void expect_holds(const MemoryState& got, const MemoryState& expected) {
  ASSERT_GT(expected.tensors.size(), 20U);
  for (const MemoryState::Tensor& tensor : expected.tensors) {
    const auto found =
        std::find_if(got.tensors.begin(), got.tensors.end(),
                     [&](const MemoryState::Tensor& t) { return t.name == tensor.name; });
    ASSERT_NE(found, got.tensors.end()) << tensor.name;
    EXPECT_EQ(found->dtype, tensor.dtype) << tensor.name;
    EXPECT_EQ(found->shape, tensor.shape) << tensor.name;
    EXPECT_EQ(found->bytes, tensor.bytes) << tensor.name;
  }
}

TEST_F(TorchOracleTest, ReadsWhatTorchSaveWrote) {
  const FoundTensors found = find_in_pth(*dir_ / "file.pth");
  EXPECT_EQ(found.skipped, (std::vector<std::string>{"optim.lr", "epoch", "name"}));
  const MemoryState got = read_all(as_stored(found, dir_->path()));
  const MemoryState whole = read_all(StoredTensors::open(*dir_ / "whole"));
  EXPECT_EQ(got.tensors.size(), whole.tensors.size() + 1);  // And the view.
  expect_holds(got, whole);
}

TEST_F(TorchOracleTest, ReadsWhatTwoRanksOfDcpWrote) {
  const FoundTensors found = find_in_dcp(*dir_ / "dcp");
  EXPECT_EQ(found.skipped.size(), 3U);  // epoch, nested.lr, nested.names
  const MemoryState got = read_all(as_stored(found, *dir_ / "dcp"));
  const MemoryState whole = read_all(StoredTensors::open(*dir_ / "whole"));
  EXPECT_EQ(got.tensors.size(), whole.tensors.size());
  expect_holds(got, whole);
}

TEST_F(TorchOracleTest, RefusesByNameWhatIsNoPlainTensor) {
  const auto find = [&](const char* name) {
    find_in_pth(*dir_ / ("refused/" + std::string(name)));
  };
  EXPECT_ERROR(find("system.pth"), ModelError, "asks for 'posix system', which is not accepted");
  EXPECT_ERROR(find("strided.pth"), ModelError, "'w' is not contiguous (strides [1, 4])");
  EXPECT_ERROR(find("legacy.pth"), ModelError, "the end of a zip archive is not where it belongs");
  EXPECT_ERROR(find("list.pth"), ModelError, "holds no dict of tensors");
  EXPECT_ERROR(find("deflated.pth"), ModelError, "compressed or encrypted");
  EXPECT_FALSE(std::filesystem::exists(*dir_ / "refused/ran"));
}

TEST_F(TorchOracleTest, AMissingPartOfADcpDirectoryIsNamed) {
  const TempDir dir;
  std::filesystem::copy(*dir_ / "dcp", dir / "dcp");
  std::filesystem::remove(dir / "dcp/__1_0.distcp");
  EXPECT_ERROR(find_in_dcp(dir / "dcp"), ModelError, "__1_0.distcp: cannot open");
}

}  // namespace
}  // namespace fsdp::checkpoint
