// Both ways against torch.distributed.checkpoint: it loads what we write, we load what it writes.
#include <cstdlib>
#include <filesystem>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/load_state.h"
#include "libfsdp/checkpoint/save_plan.h"
#include "tests/unit/checkpoint/memory_state.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::checkpoint {
namespace {

using io::TempDir;

class DcpOracleTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(FSDP_TEST_PYTHON))
      GTEST_SKIP() << "no Python at " FSDP_TEST_PYTHON;
  }
  void run(const std::string& command) {
    const std::string line = cat("\"" FSDP_TEST_PYTHON "\" \"" FSDP_TEST_ORACLE "\" ", command,
                                 " \"", dir_.path(), "\"");
    ASSERT_EQ(std::system(line.c_str()), 0) << line;
  }
  const TempDir dir_;
};

void write_sharded(MemoryState& memory, const std::string& directory, int64_t world) {
  std::filesystem::create_directories(directory);
  for (int64_t rank = 0; rank < world; ++rank) {
    const StateDict state = memory.state(rank, world);
    RangeWriter writer(directory);
    write_state(plan_sharded(state, rank), state, rank, writer);
    writer.finish();
  }
}

void write_full(MemoryState& memory, const std::string& directory) {
  std::filesystem::create_directories(directory);
  const StateDict state = memory.state(0, 1);
  RangeWriter writer(directory);
  write_state(plan_full(state), state, 0, writer);
  writer.finish();
}

/// Whole tensors of a full or sharded directory, read by `world` ranks.
MemoryState read_all(const StoredTensors& stored, int64_t world) {
  MemoryState memory;
  for (const auto& [name, tensor] : stored.tensors())
    memory.add(name, tensor.dtype.value(), tensor.shape);
  for (int64_t rank = 0; rank < world; ++rank)
    load_state(memory.state(rank, world), stored, {.buffer_bytes = 1000});
  return memory;
}

TEST_F(DcpOracleTest, ReadsWhatTwoRanksOfPyTorchWrote) {
  run("make");
  const auto file = io::SafetensorsFile::open(dir_ / "whole.safetensors");
  for (const char* name : {"one_file", "three_files", "replicated"}) {
    SCOPED_TRACE(name);
    for (const int64_t world : {1, 3, 4}) {
      const MemoryState memory = read_all(StoredTensors::open(dir_ / name), world);
      ASSERT_EQ(memory.tensors.size(), file.entries().size());
      for (const MemoryState::Tensor& tensor : memory.tensors) {
        const io::TensorEntry* entry = file.find(tensor.name);
        ASSERT_NE(entry, nullptr);
        EXPECT_EQ(tensor.shape, entry->shape) << tensor.name;
        EXPECT_EQ(tensor.dtype, entry->dtype) << tensor.name;
        std::vector<std::byte> bytes(static_cast<size_t>(entry->bytes));
        file.read(*entry, 0, bytes);
        EXPECT_EQ(tensor.bytes, bytes) << tensor.name;
      }
    }
  }
}

TEST_F(DcpOracleTest, PyTorchReadsWhatFiveRanksWrote) {
  MemoryState memory, floats;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64, DType::kI64,
                            DType::kI32, DType::kI16, DType::kI8, DType::kU8, DType::kBool}) {
    for (const std::vector<int64_t>& shape :
         {std::vector<int64_t>{}, {11}, {5, 7}, {3, 4, 5}, {1, 6}, {2, 3, 2, 3}, {0, 4}}) {
      const std::string name = cat("state.", dtype_name(dtype), io::shape_text(shape), ".exp_avg");
      memory.add(name, dtype, shape);
      if (dtype <= DType::kBF16 && !shape.empty() && shape[0] > 0) floats.add(name, dtype, shape);
    }
  }
  memory.fill();
  floats.fill();
  write_sharded(memory, dir_ / "ours", 5);
  write_full(memory, dir_ / "ours_whole");
  write_sharded(floats, dir_ / "floats", 5);
  write_full(floats, dir_ / "floats_whole");
  run("check");
}

}  // namespace
}  // namespace fsdp::checkpoint
