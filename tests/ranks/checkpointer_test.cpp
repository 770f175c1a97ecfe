// Checkpoints of a custom loop: saved at one number of ranks, resumed at another, in both forms,
// in the background, damaged.

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "libfsdp/base/error.h"
#include "libfsdp/io/safetensors.h"
#include "libfsdp/shard/checkpointer.h"
#include "libfsdp/shard/dropout.h"
#include "libfsdp/shard/state_dict.h"
#include "tests/ranks/training_run.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

namespace fs = std::filesystem;

/// A directory of its own that goes away.
class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "checkpoint_test_XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~Folder() { fs::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::string string() const { return path_.string(); }

 private:
  fs::path path_;
};

/// A residual net with dropout in its head's input: random numbers must go on where they were.
struct NoisyNetImpl : torch::nn::Module {
  ResidualNet inner;
  explicit NoisyNetImpl(int seed) : inner(make(seed)) { register_module("inner", inner); }
  static ResidualNet make(int seed) {
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    torch::manual_seed(static_cast<uint64_t>(seed));
    return ResidualNet(3);
  }
  at::Tensor loss(const MicroBatch& batch) {
    at::Tensor x = inner->embed(batch.ids);
    for (auto& block : inner->blocks) x = fsdp::dropout(block->forward(x), 0.2, true);
    return at::cross_entropy_loss(inner->head(x), batch.targets, {}, at::Reduction::Sum);
  }
};
TORCH_MODULE(NoisyNet);

/// A user's object: what the loop has seen.
struct Diary {
  std::vector<int64_t> seen;
  std::string state() const { return io::Json(seen).dump(); }
  void load_state(const std::string& text) {
    seen = io::Json::parse(text, "diary").as<std::vector<int64_t>>();
  }
};

constexpr int kTotal = 6;
constexpr int kAll = 4;

struct Run {
  int ranks = 2;
  ShardOptions options = base_options();
  CheckpointerOptions checkpoints;
  std::vector<int> save_at;
  int stop_after = kTotal;
  std::string from = "auto";
};
struct Result {
  int64_t begin = -1;
  std::vector<double> losses;
  std::vector<int64_t> diary;
  std::vector<std::string> notes;
  Trajectory end;
};

Result run(const Run& how) {
  Result result;
  run_ranks(how.ranks, [&](comm::Communicator& own) {
    auto model = fully_shard(NoisyNet(own.rank() + 5), borrow(own), how.options);
    Diary diary;
    Checkpointer checkpoints(model, how.checkpoints);
    checkpoints.add("diary", diary);
    const auto begin = checkpoints.resume(how.from);
    for (int step = static_cast<int>(begin.value_or(0)); step < how.stop_after;) {
      Step open = model.begin_step((kAll - own.rank() + own.size() - 1) / own.size());
      for (int m = own.rank(); m < kAll; m += own.size()) {
        const MicroBatch batch = micro_batch(step, m);
        open.backward(model.run([&](auto& net) { return net.loss(batch); }), batch.ids.numel());
      }
      const StepStats stats = open.finish({.learning_rate = 1e-2});
      diary.seen.push_back(step);
      if (own.rank() == 0) result.losses.push_back(stats.loss);
      ++step;
      if (std::find(how.save_at.begin(), how.save_at.end(), step) != how.save_at.end())
        checkpoints.save(step);
      checkpoints.poll();
    }
    checkpoints.wait();
    collect_weights(model.core(), result.end);
    if (own.rank() != 0) return;
    result.begin = begin.value_or(-1);
    result.diary = diary.seen;
    result.notes = checkpoints.notes();
  });
  return result;
}

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder))
    names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

void expect_goes_on(const Result& got, const Result& truth, int64_t from) {
  EXPECT_EQ(got.begin, from);
  EXPECT_EQ(got.diary, truth.diary);
  EXPECT_EQ(got.losses, std::vector<double>(truth.losses.begin() + std::max<int64_t>(from, 0),
                                            truth.losses.end()));
  EXPECT_EQ(got.end.weights, truth.end.weights);
}

Result uninterrupted() {
  const Folder folder;
  return run({.ranks = 1, .checkpoints = {.directory = folder / "run"}});
}

TEST(Checkpointer, GoesOnAtAnyNumberOfRanksAndUnderAnyStrategy) {
  const bool all = std::getenv("FSDP_TEST_SCALE") != nullptr;
  const Result truth = uninterrupted();
  std::vector<std::pair<int, ShardOptions>> places;
  for (const int ranks : {1, 2, 3, 4, 8}) {
    ShardOptions options = base_options();
    places.emplace_back(ranks, options);
    options.placement.force_slot_home = false;
    options.placement.slots = 0;
    options.poison = false;
    places.emplace_back(ranks, options);
    options.strategy = plan::Strategy::kNoShard;
    places.emplace_back(ranks, options);
    options.strategy = plan::Strategy::kHybridShard;
    options.placement.sharding_group_size = ranks % 2 == 0 ? 2 : 1;
    places.emplace_back(ranks, options);
  }
  for (const auto form : {StateForm::kSharded, StateForm::kFull}) {
    for (size_t from = 0; from < places.size(); ++from) {
      const Folder folder;
      const CheckpointerOptions checkpoints{
          .directory = folder / "run", .form = form, .async = from % 2 == 1};
      run({.ranks = places[from].first,
           .options = places[from].second,
           .checkpoints = checkpoints,
           .save_at = {3},
           .stop_after = 4});
      for (size_t to = 0; to < places.size(); ++to) {
        if (!all && to != (7 * from + 2) % places.size()) continue;
        SCOPED_TRACE(cat("place ", from, " to place ", to));
        expect_goes_on(run({.ranks = places[to].first,
                            .options = places[to].second,
                            .checkpoints = checkpoints}),
                       truth, 3);
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

TEST(Checkpointer, StartsAnewWithoutACheckpoint) {
  const Folder folder;
  const Result result = run({.checkpoints = {.directory = folder / "run"}});
  EXPECT_EQ(result.begin, -1);
  EXPECT_TRUE(result.notes.empty());
}

TEST(Checkpointer, KeepsTheNewest) {
  const Folder folder;
  run({.checkpoints = {.directory = folder / "run", .save_total_limit = 2},
       .save_at = {1, 2, 3, 4, 5}});
  EXPECT_EQ(names_in(folder / "run"),
            (std::vector<std::string>{"checkpoint-4", "checkpoint-5", "latest"}));
}

TEST(Checkpointer, PassesADamagedCheckpointByAndSaysWhy) {
  const Result truth = uninterrupted();
  const Folder folder;
  const CheckpointerOptions checkpoints{.directory = folder / "run"};
  run({.checkpoints = checkpoints, .save_at = {2, 4}});
  const std::string file =
      folder / "run/checkpoint-4/optimizer_0/shard-00002-model-00001-of-00001.safetensors";
  std::fstream damaged(file, std::ios::in | std::ios::out | std::ios::binary);
  damaged.seekp(-5, std::ios::end);
  damaged.put('\x55');
  damaged.close();
  const Result got = run({.ranks = 3, .checkpoints = checkpoints});
  expect_goes_on(got, truth, 2);
  ASSERT_EQ(got.notes.size(), 1U);
  EXPECT_NE(got.notes[0].find("shard-00002-model-00001-of-00001.safetensors"), std::string::npos)
      << got.notes[0];
  EXPECT_NE(got.notes[0].find("state."), std::string::npos) << got.notes[0];
  // Asked for by its path it is an error.
  const std::string errors = run_ranks_quietly(2, [&](comm::Communicator& own) {
    auto model = fully_shard(NoisyNet(1), borrow(own), base_options());
    Checkpointer(model, checkpoints).resume(folder / "run/checkpoint-4");
  });
  EXPECT_NE(errors.find("shard-00002-model-00001-of-00001.safetensors"), std::string::npos)
      << errors;
}

std::string resume_with(const std::string& directory, ShardOptions options) {
  return run_ranks_quietly(2, [&](comm::Communicator& own) {
    auto model = fully_shard(NoisyNet(1), borrow(own), options);
    Checkpointer(model, {.directory = directory}).resume();
  });
}

TEST(Checkpointer, RefusesAnotherOptimizerPrecisionOrSeed) {
  const Folder folder;
  run({.checkpoints = {.directory = folder / "run"}, .save_at = {2}, .stop_after = 2});
  ShardOptions sgd = base_options();
  sgd.optimizer = {.kind = optim::OptimizerKind::kSgd, .momentum = 0.9};
  EXPECT_NE(resume_with(folder / "run", sgd).find("momentum_buffer"), std::string::npos);
  ShardOptions bf16 = base_options();
  bf16.param_dtype = DType::kBF16;
  EXPECT_NE(resume_with(folder / "run", bf16).find("instead of bfloat16"), std::string::npos);
  ShardOptions seed = base_options();
  seed.seed = 3;
  EXPECT_NE(resume_with(folder / "run", seed).find("seed"), std::string::npos);
}

TEST(Checkpointer, TellsAllRanksOfAFailedSaveAndKeepsTheOlderOne) {
  const Folder folder;
  const CheckpointerOptions checkpoints{.directory = folder / "run"};
  run({.checkpoints = checkpoints, .save_at = {2}, .stop_after = 2});
  for (const bool async : {false, true}) {
    std::atomic<int> told = 0;
    run_ranks(2, [&](comm::Communicator& own) {
      auto model = fully_shard(NoisyNet(1), borrow(own), base_options());
      Checkpointer again(model, {.directory = folder / "run", .async = async});
      Diary diary;
      again.add("diary", diary);
      again.resume();
      try {
        again.save(3, {.files = {{.name = "../outside", .content = "x"}}});
        again.wait();
      } catch (const Error& e) {
        ++told;
      }
    });
    EXPECT_EQ(told, 2);
    EXPECT_EQ(names_in(folder / "run"), (std::vector<std::string>{"checkpoint-2", "latest"}));
  }
}

TEST(Checkpointer, SavesInTheBackgroundWhatHasChangedItsShape) {
  const Folder folder;
  run_ranks(2, [&](comm::Communicator& own) {
    auto model = fully_shard(NoisyNet(1), borrow(own), base_options());
    int skipped = 0;
    CheckpointerOptions options{
        .directory = folder / "run", .form = StateForm::kFull, .async = true};
    options.model = [&](ShardedCore& core) {
      auto state = model_state(core);
      state.tensors.erase(state.tensors.begin(), state.tensors.begin() + skipped);
      return state;
    };
    Checkpointer checkpoints(model, options);
    for (const int step : {1, 2}) {
      skipped = step - 1;
      checkpoints.save_async(step);
      checkpoints.wait();
    }
  });
  const auto whole = io::SafetensorsFile::open(folder / "run/checkpoint-1/model.safetensors");
  const auto part = io::SafetensorsFile::open(folder / "run/checkpoint-2/model.safetensors");
  EXPECT_EQ(part.entries().size() + 1, whole.entries().size());
  const auto bytes_of = [](const io::SafetensorsFile& file, const io::TensorEntry& entry) {
    std::vector<std::byte> bytes(static_cast<size_t>(entry.bytes));
    file.read(entry, 0, bytes);
    return bytes;
  };
  for (const io::TensorEntry& entry : part.entries()) {
    EXPECT_EQ(bytes_of(part, entry), bytes_of(whole, *whole.find(entry.name))) << entry.name;
  }
}

TEST(Checkpointer, LoadsAModelWithoutItsOptimizer) {
  const Folder folder;
  ShardOptions options = base_options();
  options.param_dtype = DType::kBF16;
  const Result truth =
      run({.options = options, .checkpoints = {.directory = folder / "run"}, .save_at = {kTotal}});
  Trajectory loaded;
  run_ranks(3, [&](comm::Communicator& own) {
    auto model = fully_shard(NoisyNet(1), borrow(own), options);
    Checkpointer(model, {.directory = folder / "other"}).load_model(folder / "run/checkpoint-6");
    collect_weights(model.core(), loaded);
    EXPECT_EQ(model.core().executor().step(), 0);
  });
  EXPECT_EQ(loaded.weights, truth.end.weights);
}

}  // namespace
}  // namespace fsdp::testing
