#include "libfsdp/trainer/options.h"

#include <gtest/gtest.h>

#include <set>

#include "libfsdp/base/error.h"

namespace fsdp::trainer {
namespace {

template <class Options>
std::string refusal(const std::vector<std::string>& arguments) {
  try {
    Options options;
    const auto origins = load_options(fields_of(options), arguments, "finetune");
    options.check(origins);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "accepted";
}

std::string train_refusal(std::vector<std::string> extra) {
  std::vector<std::string> arguments = {"--model_name_or_path", "m", "--train_file", "t",
                                        "--output_dir",         "o"};
  arguments.insert(arguments.end(), extra.begin(), extra.end());
  return refusal<TrainOptions>(arguments);
}

#define EXPECT_MENTIONS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST(TrainOptionsTest, DefaultsAreThoseOfHuggingFace) {
  TrainOptions options;
  EXPECT_EQ(options.per_device_train_batch_size, 8);
  EXPECT_EQ(options.learning_rate, 5e-5);
  EXPECT_EQ(options.num_train_epochs, 3);
  EXPECT_EQ(options.max_grad_norm, 1.0);
  EXPECT_EQ(options.adam_epsilon, 1e-8);
  EXPECT_EQ(options.lr_scheduler_type, optim::LrScheduleKind::kLinear);
  EXPECT_EQ(options.sequence.max_seq_length, 1024);
  EXPECT_EQ(train_refusal({}), "accepted");
}

TEST(TrainOptionsTest, ContradictionsAreRefusedWithBothOrigins) {
  EXPECT_MENTIONS(train_refusal({"--eval_strategy", "epoch"}),
                  "--eval_strategy (command line) contradicts --validation_file (default)");
  EXPECT_MENTIONS(train_refusal({"--warmup_steps", "3", "--warmup_ratio", "0.1"}),
                  "give one of them");
  EXPECT_MENTIONS(train_refusal({"--eval_steps", "3"}), "eval_strategy=steps");
  EXPECT_MENTIONS(train_refusal({"--lr_scheduler_type", "constant", "--warmup_steps", "3"}),
                  "constant_with_warmup");
  EXPECT_MENTIONS(train_refusal({"--optim", "sgd", "--adam_beta1", "0.5"}),
                  "sgd has no such number");
  EXPECT_MENTIONS(train_refusal({"--gamma", "0.5"}), "only the type `step`");
  EXPECT_MENTIONS(train_refusal({"--warmup_steps", "2.5"}), "whole number");
  EXPECT_MENTIONS(train_refusal({"--max_steps", "0"}), "train nothing");
  EXPECT_MENTIONS(train_refusal({"--fp16", "--bf16"}), "choose one precision");
  EXPECT_MENTIONS(train_refusal({"--pure_bf16", "--optim", "sgd"}), "use anyprecision");
  EXPECT_MENTIONS(train_refusal({"--sharding_group_size", "2"}), "only HYBRID_SHARD");
  EXPECT_MENTIONS(train_refusal({"--memory_budget_gib", "2", "--kept_units", "3"}), "the budget");
  EXPECT_MENTIONS(train_refusal({"--deterministic", "--unsharded_accumulation"}),
                  "order of its sums");
  EXPECT_MENTIONS(train_refusal({"--momentum", "0.9"}), "only sgd");
  EXPECT_EQ(train_refusal(
                {"--evaluation_strategy", "steps", "--eval_steps", "5", "--validation_file", "v"}),
            "accepted");
}

TEST(TrainOptionsTest, RequiredOptionsAreAskedForByName) {
  EXPECT_MENTIONS(refusal<TrainOptions>({}), "--model_name_or_path is required");
  EXPECT_MENTIONS(refusal<TrainOptions>({"--model_name_or_path", "m"}), "--train_file is required");
  EXPECT_MENTIONS(refusal<EvalOptions>({"--model_name_or_path", "m"}),
                  "--validation_file is required");
  EXPECT_MENTIONS(refusal<ConvertOptions>({"--from", "x"}), "--to is required");
}

TEST(TrainOptionsTest, TheSourceModelIsNotOverwritten) {
  EXPECT_MENTIONS(refusal<TrainOptions>({"--model_name_or_path", "/tmp", "--train_file", "t",
                                         "--output_dir", "/tmp/../tmp"}),
                  "would be overwritten");
}

TEST(GenerateOptionsTest, SamplingNeedsATemperature) {
  const std::vector<std::string> base = {"--model_name_or_path", "m", "--prompt", "p"};
  auto arguments = base;
  arguments.insert(arguments.end(), {"--top_p", "0.5"});
  EXPECT_MENTIONS(refusal<GenerateOptions>(arguments), "temperature above 0");
  EXPECT_EQ(refusal<GenerateOptions>(base), "accepted");
  EXPECT_MENTIONS(refusal<GenerateOptions>({"--model_name_or_path", "m"}), "--prompt");
}

template <class Options>
void expect_unique_names() {
  Options options;
  std::set<std::string> seen;
  for (const auto& field : fields_of(options)) {
    EXPECT_TRUE(seen.insert(field.name).second) << field.name;
    for (const auto& alias : field.rules.aliases) EXPECT_TRUE(seen.insert(alias).second) << alias;
  }
}

TEST(OptionsTest, NoNameMeansTwoThings) {
  expect_unique_names<TrainOptions>();
  expect_unique_names<EvalOptions>();
  expect_unique_names<GenerateOptions>();
  expect_unique_names<ConvertOptions>();
  expect_unique_names<NewModelOptions>();
  expect_unique_names<ShowDataOptions>();
}

}  // namespace
}  // namespace fsdp::trainer
