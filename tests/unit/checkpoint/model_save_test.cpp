// The files of a model, written by ranks as threads.
#include "libfsdp/checkpoint/model_save.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/load_state.h"
#include "libfsdp/checkpoint/staged_directory.h"
#include "tests/support/rank_threads.h"
#include "tests/unit/checkpoint/memory_state.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::checkpoint {
namespace {

using io::TempDir;
using ::testing::HasSubstr;

MemoryState make_state() {
  MemoryState state;
  state.add("w", DType::kF32, {5, 7});
  state.add("b", DType::kF32, {5});
  state.add("empty", DType::kF32, {0, 3});
  state.add("z", DType::kF32, {11});
  state.fill();
  return state;
}

/// By three ranks, each with what lies in its third of the elements.
void save(const std::string& directory, const FullForm& form,
          const std::vector<TextFile>& texts = {}) {
  MemoryState state = make_state();
  testing::run_ranks(3, [&](comm::Communicator& comm) {
    save_model(comm, directory, state.state(comm.rank(), 3), form, texts);
  });
}

MemoryState loaded(const std::string& directory) {
  MemoryState state = make_state().blank();
  load_state(state.state(0, 1), StoredTensors::open(directory));
  return state;
}

TEST(ModelSaveTest, ThreeRanksWriteTheSameBytesAsOneWriter) {
  const MemoryState state = make_state();
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const TempDir dir;
    save(dir.path(), {.dtype = dtype});
    EXPECT_EQ(dir.num_files(), 1U);
    std::vector<io::TensorSpec> specs;
    std::vector<std::vector<std::byte>> bytes;
    for (const MemoryState::Tensor& tensor : state.tensors) {
      specs.push_back({tensor.name, dtype, tensor.shape});
      const auto numel = static_cast<size_t>(tensor.numel());
      bytes.emplace_back(numel * dtype_bytes(dtype));
      convert_floats(tensor.bytes.data(), DType::kF32, bytes.back().data(), dtype, numel);
    }
    const std::vector<std::span<const std::byte>> data(bytes.begin(), bytes.end());
    io::write_safetensors(dir / "whole", specs, data);
    EXPECT_EQ(io::read_text(dir / "model.safetensors"), io::read_text(dir / "whole"));
  }
}

TEST(ModelSaveTest, SeveralFilesAndTextsReadBack) {
  const TempDir dir;
  save(dir / "a/b", {.max_file_bytes = 100}, {{"config.json", "{}"}});
  EXPECT_EQ(io::HfWeights::open(dir / "a/b").files().size(), 2U);
  EXPECT_EQ(io::read_text(dir / "a/b/config.json"), "{}");
  const MemoryState back = loaded(dir / "a/b"), expected = make_state();
  for (size_t t = 0; t < expected.tensors.size(); ++t)
    EXPECT_EQ(back.tensors[t].bytes, expected.tensors[t].bytes) << expected.tensors[t].name;
}

TEST(ModelSaveTest, RemovesWeightsOfAnOlderSaveAndNothingElse) {
  const TempDir dir;
  dir.write("notes.txt", "{}");
  dir.write("adapter_model.safetensors", "x");
  dir.write("model-00007-of-00009.safetensors", "x");
  save(dir.path(), {});
  EXPECT_EQ(dir.num_files(), 3U);
  save(dir.path(), {.max_file_bytes = 100});
  EXPECT_FALSE(name_exists(dir / "model.safetensors"));
  EXPECT_EQ(dir.num_files(), 5U);
  save(dir.path(), {.max_file_bytes = 100});
  EXPECT_EQ(io::HfWeights::open(dir.path()).names().size(), 4U);
  save(dir.path(), {.stem = "adapter_model"});
  EXPECT_EQ(io::HfWeights::open(dir.path()).names().size(), 4U);
  save(dir.path(), {});
  EXPECT_FALSE(name_exists(dir / "model.safetensors.index.json"));
  EXPECT_EQ(dir.num_files(), 3U);
}

TEST(ModelSaveTest, WhereARankFailsAllDoAndTheOldModelStays) {
  const TempDir dir;
  save(dir.path(), {});
  const std::string old = io::read_text(dir / "model.safetensors");
  MemoryState state = make_state();
  testing::run_ranks(3, [&](comm::Communicator& comm) {
    StateDict mine = state.state(comm.rank(), 3);
    if (comm.rank() == 1) {
      mine.tensors[0].read = [](int64_t, std::span<std::byte>) -> void {
        throw HostResourceError("no values");
      };
    }
    EXPECT_ERROR(save_model(comm, dir.path(), mine, {.dtype = DType::kBF16}), HostResourceError,
                 "rank 1: no values");
  });
  EXPECT_EQ(dir.num_files(), 1U);
  EXPECT_EQ(io::read_text(dir / "model.safetensors"), old);
}

TEST(ModelSaveTest, ElementsThatNobodyWritesAreAnError) {
  const TempDir dir;
  MemoryState state = make_state();
  testing::run_ranks(2, [&](comm::Communicator& comm) {
    EXPECT_ERROR(save_model(comm, dir.path(), state.state(comm.rank(), 3), {}), InternalError,
                 "a save wrote");
  });
  EXPECT_EQ(dir.num_files(), 0U);
}

TEST(ModelSaveTest, WhatAKilledSaveLeftGoesAndThatOfALiveOneStays) {
  const TempDir dir;
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const StagedDirectory staged(dir.path());
    io::write_text_atomic(staged.path() + "/model.safetensors", "half");
    [[maybe_unused]] const auto told = ::write(ready[1], "x", 1);
    for (;;) ::pause();
  }
  char told = 0;
  ASSERT_EQ(::read(ready[0], &told, 1), 1);
  EXPECT_TRUE(remove_leftovers(dir.path()).empty());
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  EXPECT_EQ(dir.num_files(), 1U);
  EXPECT_THAT(remove_leftovers(dir.path()), ::testing::ElementsAre(HasSubstr(".tmp-model-")));
  EXPECT_EQ(dir.num_files(), 0U);
  for (const int end : ready) ::close(end);
}

}  // namespace
}  // namespace fsdp::checkpoint
