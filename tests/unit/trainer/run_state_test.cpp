#include "libfsdp/trainer/run_state.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "libfsdp/base/error.h"
#include "libfsdp/io/file.h"

namespace fsdp::trainer {
namespace {

TEST(RunStateTest, ReadsBackWhatItWrote) {
  RunState state{.step = 7, .epoch = 0.1, .loss_sum = 1.0 / 3, .logged_loss = 2e-300};
  state.logged_steps = 3;
  state.samples = 11;
  state.tokens = int64_t{1} << 60;
  state.seconds = 0.7;
  state.best_metric = 5e-324;
  state.best_step = 4;
  state.patience_used = 2;
  state.evaluation_due = true;
  state.log(StepRecord{.step = 7, .loss = 1}, 0.25);
  const auto text = state.json().dump();
  EXPECT_EQ(RunState::from_json(io::Json::parse(text, "test")).json().dump(), text);
  EXPECT_FALSE(RunState::from_json(RunState().json()).best_metric.has_value());
}

TEST(RunStateTest, CountsEvaluationsThatAreNotBetter) {
  RunState state;
  const auto note = [&](int64_t step, double value) {
    state.step = step;
    return state.note_metric(value, /*greater_is_better=*/false, /*threshold=*/0.1);
  };
  EXPECT_TRUE(note(1, 3));  // The first is the best.
  EXPECT_EQ(state.patience_used, 0);
  EXPECT_TRUE(note(2, 2.95));  // Better, but not by enough to be patient for.
  EXPECT_EQ(state.patience_used, 1);
  EXPECT_EQ(state.best_step, 2);
  EXPECT_FALSE(note(3, 3.5));
  EXPECT_EQ(state.patience_used, 2);
  EXPECT_TRUE(note(4, 2));
  EXPECT_EQ(state.patience_used, 0);
  EXPECT_EQ(state.best_metric, 2);
  EXPECT_TRUE(state.note_metric(9, /*greater_is_better=*/true, 0));
}

RunIdentity identity() {
  return {.options = io::Json::object({{"learning_rate", 0.5},
                                       {"seed", 3},
                                       {"reduce_dtype", ""},
                                       {"output_dir", "a"},
                                       {"nproc_per_node", 2}}),
          .train_data = "d",
          .model = "m",
          .micro_batches_a_step = 4};
}

std::vector<std::string> names(const std::vector<Difference>& differences) {
  std::vector<std::string> all;
  for (const Difference& one : differences) all.push_back(one.name);
  return all;
}

TEST(RunIdentityTest, OnlyWhatChangesTheNumbersIsADifference) {
  RunIdentity now = identity();
  now.options["output_dir"] = "b";
  now.options["nproc_per_node"] = 8;
  now.ranks = 8;
  EXPECT_TRUE(RunIdentity::compare(identity(), now, {}).empty());
  now.options["learning_rate"] = 0.25;
  now.options["seed"] = 4;
  now.options["reduce_dtype"] = "bfloat16";
  now.train_data = "e";
  now.micro_batches_a_step = 8;
  EXPECT_EQ(names(RunIdentity::compare(identity(), now, {})),
            (std::vector<std::string>{"learning_rate", "seed", "reduce_dtype", "train_file",
                                      "gradient_accumulation_steps"}));
  EXPECT_EQ(
      names(RunIdentity::compare(identity(), now, {"seed", "train_file"})),
      (std::vector<std::string>{"learning_rate", "reduce_dtype", "gradient_accumulation_steps"}));
}

TEST(RunIdentityTest, DifferencesAreToldWithBothValuesAndTheWayOut) {
  RunIdentity now = identity();
  now.options["learning_rate"] = 0.25;
  now.options["reduce_dtype"] = "bfloat16";
  const auto back = RunIdentity::from_json(io::Json::parse(identity().json().dump(), "test"));
  try {
    refuse_differences(RunIdentity::compare(back, now, {}), "run/checkpoint-3");
    FAIL() << "nothing was refused";
  } catch (const ConfigError& error) {
    const std::string text = error.what();
    for (const char* part : {"run/checkpoint-3", "learning_rate (saved: 0.5, now: 0.25)",
                             "reduce_dtype (saved: none, now: bfloat16)",
                             "--allow_changed_options learning_rate,reduce_dtype"}) {
      EXPECT_NE(text.find(part), std::string::npos) << part << " is not in: " << text;
    }
  }
  EXPECT_NO_THROW(refuse_differences({}, "x"));
}

TEST(MetricsFileTest, GoesOnAfterTheLinesOfEarlierSteps) {
  const auto folder = std::filesystem::temp_directory_path() / "metrics_resume_test";
  std::filesystem::create_directories(folder);
  const auto from = folder / "from.jsonl", to = folder / "to.jsonl";
  {
    std::ofstream out(from);
    out << "{\"step\":1}\n{\"step\":2}\n{\"step\":2,\"eval_loss\":1}\n{\"step\":3}\n{\"ste";
  }
  MetricsFile(to, from, 2).write(EvalRecord{.step = 9});
  const std::string text = io::read_text(to.string());
  EXPECT_TRUE(
      text.starts_with("{\"step\":1}\n{\"step\":2}\n{\"step\":2,\"eval_loss\":1}\n{\"step\":9,"))
      << text;
  MetricsFile(to, folder / "missing.jsonl", 2);
  EXPECT_EQ(io::read_text(to.string()), "");
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace fsdp::trainer
