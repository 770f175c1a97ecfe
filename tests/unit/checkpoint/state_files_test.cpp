// States written by some ranks and read by others, through the full and the sharded form.
#include <rapidcheck.h>

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

MemoryState model() {
  MemoryState state;
  state.add("w", DType::kBF16, {5, 7});
  state.add("scalar", DType::kF32, {});
  state.add("cube", DType::kF32, {3, 4, 5});
  state.add("empty", DType::kF32, {0, 3});
  state.add("bias", DType::kF16, {11});
  state.add("steps", DType::kI64, {3});
  state.add("flags", DType::kBool, {2, 3});
  state.add("codes", DType::kU8, {6, 2});
  state.fill();
  return state;
}

enum class Form { kFull, kFullSmallFiles, kSharded };

int64_t save(MemoryState& memory, const std::string& directory, int64_t world, Form form,
             std::optional<DType> dtype = {}) {
  int64_t bytes = 0;
  for (int64_t rank = world; rank-- > 0;) {  // Any order: no rank waits for another.
    const StateDict state = memory.state(rank, world);
    RangeWriter writer(directory);
    const SavePlan plan =
        form == Form::kSharded
            ? plan_sharded(state, rank, dtype)
            : plan_full(state,
                        {.dtype = dtype, .max_file_bytes = form == Form::kFull ? 1'000'000 : 100});
    write_state(plan, state, rank, writer);
    writer.finish();
    bytes += writer.written_bytes();
  }
  return bytes;
}

void expect_loads(const MemoryState& memory, const std::string& directory, int64_t world,
                  int64_t buffer_bytes) {
  const StoredTensors stored = StoredTensors::open(directory);
  MemoryState loaded = memory.blank();
  for (int64_t rank = 0; rank < world; ++rank) {
    const StateDict state = loaded.state(rank, world);
    const LoadReport report = load_state(state, stored, {.buffer_bytes = buffer_bytes});
    int64_t bytes = 0;
    for (const TensorPart& part : state.tensors)
      bytes += part.numel * static_cast<int64_t>(dtype_bytes(part.dtype));
    EXPECT_EQ(report.loaded_bytes, bytes);  // Its own bytes and no others.
  }
  for (size_t t = 0; t < memory.tensors.size(); ++t) {
    EXPECT_EQ(loaded.tensors[t].bytes, memory.tensors[t].bytes) << memory.tensors[t].name;
    EXPECT_EQ(std::count(loaded.tensors[t].written.begin(), loaded.tensors[t].written.end(), true),
              memory.tensors[t].numel());
  }
}

TEST(StateFilesTest, EveryFormLoadsAtEveryNumberOfRanks) {
  MemoryState memory = model();
  for (const Form form : {Form::kFull, Form::kFullSmallFiles, Form::kSharded}) {
    for (const int64_t writers : {1, 2, 3, 4, 8, 40}) {
      const TempDir dir;
      save(memory, dir.path(), writers, form);
      for (const int64_t readers : {1, 2, 3, 4, 8, 40}) {
        for (const int64_t buffer : {8, 50, 1 << 20})
          expect_loads(memory, dir.path(), readers, buffer);
      }
    }
  }
}

/// Parts that say where they lie; what `read` is asked for, and large ranges for `write`, fail.
StateDict in_memory(MemoryState& memory, int64_t rank, int64_t world) {
  StateDict state = memory.state(rank, world);
  for (size_t t = 0; t < state.tensors.size(); ++t) {
    TensorPart& part = state.tensors[t];
    const auto width = static_cast<int64_t>(dtype_bytes(part.dtype));
    part.target = {memory.tensors[t].bytes.data() + part.at * width,
                   static_cast<size_t>(part.numel * width)};
    part.source = part.target;
    part.read = [](int64_t, std::span<std::byte>) { FAIL() << "a copy"; };
    part.write = [small = part.write](int64_t at, std::span<const std::byte> from) {
      EXPECT_LT(from.size(), size_t{64} << 10);
      small(at, from);
    };
  }
  return state;
}

TEST(StateFilesTest, WhatLiesInMemoryIsWrittenAndReadWithoutACopy) {
  MemoryState memory = model();
  memory.add("matrix", DType::kF32, {300, 401});
  memory.add("after", DType::kBF16, {7});
  memory.fill();
  for (const Form form : {Form::kFull, Form::kSharded}) {
    const TempDir dir;
    for (int64_t rank = 0; rank < 3; ++rank) {
      const StateDict state = in_memory(memory, rank, 3);
      RangeWriter writer(dir.path());
      write_state(form == Form::kFull ? plan_full(state) : plan_sharded(state, rank), state, rank,
                  writer);
      writer.finish();
    }
    expect_loads(memory, dir.path(), 2, 1 << 20);
    for (const int64_t buffer_bytes : {1 << 20, 100'000, 1'000}) {
      MemoryState loaded = memory.blank();
      for (int64_t rank = 0; rank < 2; ++rank) {
        load_state(in_memory(loaded, rank, 2), StoredTensors::open(dir.path()),
                   {.buffer_bytes = buffer_bytes});
      }
      for (size_t t = 0; t < memory.tensors.size(); ++t)
        EXPECT_EQ(loaded.tensors[t].bytes, memory.tensors[t].bytes) << memory.tensors[t].name;
    }
  }
}

TEST(StateFilesTest, FullFormIsWhatOneWriterWrites) {
  MemoryState memory = model();
  for (const int64_t writers : {1, 3}) {
    const TempDir dir;
    const int64_t bytes = save(memory, dir.path(), writers, Form::kFull);
    EXPECT_EQ(dir.num_files(), 1U);
    std::vector<io::TensorSpec> specs;
    std::vector<std::span<const std::byte>> data;
    for (const auto& tensor : memory.tensors) {
      specs.push_back({tensor.name, tensor.dtype, tensor.shape});
      data.emplace_back(tensor.bytes);
    }
    io::write_safetensors(dir / "whole", specs, data);
    const std::string whole = io::read_text(dir / "whole");
    EXPECT_EQ(io::read_text(dir / "model.safetensors"), whole);
    EXPECT_EQ(bytes, static_cast<int64_t>(whole.size()));
  }
}

TEST(StateFilesTest, FloatingTensorsAreConvertedOnSaveAndOnLoad) {
  MemoryState memory = model();
  for (const Form form : {Form::kFull, Form::kSharded}) {
    const TempDir dir;
    save(memory, dir.path(), 3, form, DType::kF32);
    const StoredTensors stored = StoredTensors::open(dir.path());
    EXPECT_EQ(stored.find("w")->dtype, DType::kF32);
    EXPECT_EQ(stored.find("steps")->dtype, DType::kI64);
    MemoryState loaded = memory.blank();  // bf16 -> f32 -> bf16 loses nothing.
    load_state(loaded.state(0, 1), stored, {.buffer_bytes = 24});
    for (size_t t = 0; t < memory.tensors.size(); ++t)
      EXPECT_EQ(loaded.tensors[t].bytes, memory.tensors[t].bytes) << memory.tensors[t].name;
    EXPECT_ERROR(load_state(loaded.state(0, 1), stored, {.convert = false}), ModelError,
                 "2 tensors of another type: w F32 instead of bfloat16, bias F32 instead of");
  }
}

TEST(StateFilesTest, AnotherStemHasFilesOfItsOwn) {
  MemoryState memory = model();
  const TempDir dir;
  const StateDict state = memory.state(0, 1);
  RangeWriter writer(dir.path());
  write_state(plan_full(state, {.stem = "optimizer"}), state, 0, writer);
  write_state(plan_full(state, {.max_file_bytes = 100}), state, 0, writer, "sub");
  writer.finish();
  EXPECT_TRUE(std::filesystem::exists(dir / "optimizer.safetensors"));
  EXPECT_TRUE(std::filesystem::exists(dir / "sub/model.safetensors.index.json"));
  MemoryState loaded = memory.blank();
  load_state(loaded.state(0, 1), StoredTensors::open(dir.path(), "optimizer"));
  EXPECT_EQ(loaded.tensors[2].bytes, memory.tensors[2].bytes);
  EXPECT_ERROR(StoredTensors::open(dir.path()), ModelError, "neither model.safetensors nor");
}

TEST(StateFilesTest, AMissingShardIsNamedByTensorAndRange) {
  MemoryState memory;
  memory.add("w", DType::kF32, {8, 3});
  memory.fill();
  for (int64_t lost = 0; lost < 3; ++lost) {
    const TempDir dir;
    save(memory, dir.path(), 3, Form::kSharded);
    std::filesystem::remove(dir / cat("shard-0000", lost + 1, "-model-00001-of-0000",
                                      lost == 1 ? 3 : 2, ".safetensors"));
    MemoryState loaded = memory.blank();
    const auto text = lost == 0   ? "elements [0, 6) of tensor 'w' [8, 3]"
                      : lost == 1 ? "elements [8, 9) of tensor 'w' [8, 3]"
                                  : "elements [16, 18) of tensor 'w' [8, 3]";
    EXPECT_ERROR(load_state(loaded.state(0, 1), StoredTensors::open(dir.path())), ModelError, text);
  }
}

TEST(StateFilesTest, OverlappingPartsAreRefused) {
  MemoryState memory;
  memory.add("w", DType::kF32, {8, 3});
  memory.fill();
  const TempDir dir;
  save(memory, dir.path(), 2, Form::kSharded);
  std::filesystem::copy_file(dir / "shard-00001-model-00001-of-00001.safetensors",
                             dir / "shard-00007-model-00001-of-00001.safetensors");
  EXPECT_ERROR(StoredTensors::open(dir.path()), ModelError,
               "tensor 'w' has parts that overlap: offsets [0, 0] sizes [4, 3]");
}

TEST(StateFilesTest, AFileThatChangesBetweenLookingAndReadingIsRefused) {
  MemoryState memory = model();
  const TempDir dir;
  save(memory, dir.path(), 1, Form::kFull);
  const StoredTensors stored = StoredTensors::open(dir.path());
  const std::string text = io::read_text(dir / "model.safetensors");
  io::write_text_atomic(dir / "model.safetensors", text);
  MemoryState loaded = memory.blank();
  EXPECT_ERROR(load_state(loaded.state(0, 1), stored), ModelError, "the file changed while");
}

TEST(StateFilesTest, PrefixesAndAliasesRenameTensors) {
  MemoryState memory;
  memory.add("model.embed", DType::kF32, {4});
  memory.add("model.norm", DType::kF32, {2});
  memory.fill();
  const TempDir dir;
  save(memory, dir.path(), 1, Form::kFull);
  const StoredTensors stored = StoredTensors::open(dir.path());
  MemoryState renamed;
  renamed.add("base.head", DType::kF32, {4});
  renamed.add("base.norm", DType::kF32, {2});
  const LoadOptions options{.prefixes = {{"model.", "base."}},
                            .aliases = {{"base.embed", "base.head"}}};
  load_state(renamed.state(0, 1), stored, options);
  EXPECT_EQ(renamed.tensors[0].bytes, memory.tensors[0].bytes);
  EXPECT_EQ(renamed.tensors[1].bytes, memory.tensors[1].bytes);
  EXPECT_ERROR(
      load_state(renamed.state(0, 1), stored, {.prefixes = {{"model.norm", "model.embed"}}}),
      ModelError, "would both be called 'model.embed'");
}

TEST(StateFilesTest, NotStrictLoadsWhatFitsAndTellsTheRest) {
  MemoryState memory = model();
  const TempDir dir;
  save(memory, dir.path(), 2, Form::kSharded);
  MemoryState other;
  other.add("cube", DType::kF32, {3, 4, 5});
  other.add("bias", DType::kF16, {10});
  other.add("steps", DType::kF32, {3});
  other.add("none", DType::kF32, {3});
  const LoadReport report =
      load_state(other.state(0, 1), StoredTensors::open(dir.path()), {.strict = false});
  EXPECT_EQ(other.tensors[0].bytes, memory.tensors[2].bytes);
  EXPECT_EQ(report.missing, std::vector<std::string>{"none"});
  EXPECT_EQ(report.misshapen, std::vector<std::string>{"bias [11] instead of [10]"});
  EXPECT_EQ(report.wrong_type, std::vector<std::string>{"steps I64 instead of float32"});
  EXPECT_EQ(report.unexpected.size(), 5U);
  EXPECT_ERROR(load_state(other.state(0, 1), StoredTensors::open(dir.path())), ModelError,
               report.text());
}

}  // namespace
}  // namespace fsdp::checkpoint
