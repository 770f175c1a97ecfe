#include "libfsdp/trainer/report.h"

#include <gtest/gtest.h>

#include <unistd.h>
#include <cstring>

#include <cmath>
#include <fstream>
#include <sstream>

#include "libfsdp/base/error.h"
#include "libfsdp/io/json.h"

namespace fsdp::trainer {
namespace {

TEST(PythonReprTest, DoesNotReadBeyondTheNumber) {
  // Whatever lies on the stack behind "1.08095e+01" must not become a digit of its exponent.
  char digits[256];
  std::memset(digits, '6', sizeof digits);
  EXPECT_EQ(digits[255], '6');
  for (int i = 0; i < 1000; ++i)
    EXPECT_EQ(python_repr(10 + i * 0.0001).find('e'), std::string::npos);
}

TEST(ReportTest, NumbersArePrintedAsPythonDoes) {
  // Left: what Python 3.11 prints for the value on the right.
  EXPECT_EQ(python_repr(5e-5), "5e-05");
  EXPECT_EQ(python_repr(0.0001), "0.0001");
  EXPECT_EQ(python_repr(1.0), "1.0");
  EXPECT_EQ(python_repr(0.1 + 0.2), "0.30000000000000004");
  EXPECT_EQ(python_repr(1e16), "1e+16");
  EXPECT_EQ(python_repr(123456789012345.0), "123456789012345.0");
  EXPECT_EQ(python_repr(1.25e-7), "1.25e-07");
  EXPECT_EQ(python_repr(-2.5), "-2.5");
  EXPECT_EQ(python_repr(0.0), "0.0");
  EXPECT_EQ(python_repr(1e100), "1e+100");
  EXPECT_EQ(python_repr(std::nan("")), "nan");
}

TEST(ReportTest, RoundingIsPythons) {
  EXPECT_EQ(python_round(2.675, 2), 2.67);  // the double lies below the tie
  EXPECT_EQ(python_round(1234.56785, 4), 1234.5678);
  EXPECT_EQ(python_round(0.5, 0), 0.0);
}

TEST(ReportTest, TheSummaryIsHuggingFacesLastLine) {
  EXPECT_EQ(summary_line({.train_runtime = 2577.75,
                          .samples = 245760,
                          .steps = 30,
                          .train_loss = 1.01564,
                          .epoch = 0.9}),
            "{'train_runtime': 2577.75, 'train_samples_per_second': 95.339, "
            "'train_steps_per_second': 0.012, "
            "'train_loss': 1.01564, 'epoch': 0.9}");
}

TEST(ReportTest, StepAndEvalLinesHaveTheKnownKeys) {
  StepRecord record{.step = 5, .epoch = 0.123456, .grad_norm = 1.5, .learning_rate = 5e-5};
  EXPECT_EQ(step_line(2.345678, record),
            "{'loss': 2.3457, 'grad_norm': 1.5, 'learning_rate': 5e-05, 'epoch': 0.12}");
  EvalRecord eval{.epoch = 1, .eval_loss = 2.5, .eval_samples = 10, .eval_runtime = 4};
  EXPECT_EQ(
      eval_line(eval, true),
      "{'eval_loss': 2.5, 'eval_runtime': 4.0, 'eval_samples_per_second': 2.5, 'epoch': 1.0}");
  EXPECT_EQ(eval_line(eval, false),
            "{'eval_loss': 2.5, 'eval_runtime': 4.0, 'eval_samples_per_second': 2.5}");
}

TEST(ReportTest, MetricsAppearAtOnceAndReadBackToTheSameNumbers) {
  const auto path =
      std::filesystem::temp_directory_path() / cat("report_test_", ::getpid(), ".jsonl");
  std::ofstream(path) << "old\n";
  MetricsFile file(path);
  const StepRecord step{.step = 1,
                        .epoch = 1.0 / 3,
                        .loss = 0.1 + 0.2,
                        .grad_norm = 1e-30,
                        .learning_rate = 5e-5,
                        .tokens = 77,
                        .trainable_tokens = 33,
                        .tokens_per_second = 1e5 / 7,
                        .step_seconds = 1.0 / 7};
  file.write(step);
  std::ifstream in(path);
  std::string line;
  ASSERT_TRUE(std::getline(in, line));
  const auto json = io::Json::parse(line, "line");
  EXPECT_EQ(json.size(), 9U);
  EXPECT_EQ(json.get<double>("loss"), step.loss);
  EXPECT_EQ(json.get<double>("epoch"), step.epoch);
  EXPECT_EQ(json.get<double>("grad_norm"), step.grad_norm);
  EXPECT_EQ(json.get<double>("tokens_per_second"), step.tokens_per_second);
  EXPECT_EQ(json.get<int64_t>("trainable_tokens"), 33);
  file.write(EvalRecord{.step = 1, .eval_loss = 2.0});
  in.clear();
  ASSERT_TRUE(std::getline(in, line));
  EXPECT_EQ(io::Json::parse(line, "line").get<double>("eval_loss"), 2.0);
  std::filesystem::remove(path);
}

TEST(ReportTest, AFolderThatCannotBeMadeIsAnError) {
  EXPECT_THROW(MetricsFile("/nonexistent/metrics.jsonl"), Error);
}

}  // namespace
}  // namespace fsdp::trainer
