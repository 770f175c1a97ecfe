// Our optimizers and schedules against PyTorch's and transformers', which run in the project's
// Python.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/optim/lr_schedule.h"
#include "libfsdp/optim/optimizer.h"
#include "tests/unit/optim/run_script.h"

namespace fsdp::optim {
namespace {

constexpr int64_t kNumel = 1280;
constexpr int kSteps = 20;
constexpr double kUnit = 0x1p-24;  // largest relative rounding error of one fp32 operation

struct OptimizerCase {
  std::string name;
  OptimizerOptions options;
  double learning_rate;
  double weight_decay;
};

void PrintTo(const OptimizerCase& test_case, std::ostream* out) { *out << test_case.name; }

std::string oracle_arguments(const OptimizerCase& c, double scale) {
  const bool is_adamw = c.options.kind == OptimizerKind::kAdamW;
  const std::string common = cat(" ", kNumel, " ", kSteps, " ", scale, " lr=", c.learning_rate,
                                 " weight_decay=", c.weight_decay);
  if (is_adamw) {
    return cat("adamw", common, " beta1=", c.options.beta1, " beta2=", c.options.beta2,
               " eps=", c.options.epsilon);
  }
  return cat("sgd", common, " momentum=", c.options.momentum,
             " nesterov=", c.options.nesterov ? 1 : 0);
}

/// How far two correct evaluations of a step may lie apart after `step` of them. Each step rounds
/// the parameter about three times. Its update is at most about 5 learning rates (AdamW; the
/// numbers are drawn from one normal distribution), and is a quotient of sums whose terms' errors
/// are at most 30 units, for exp_avg forgets with 0.9.
double tolerance(const OptimizerCase& c, float parameter, int step) {
  return step * kUnit * (3 * std::fabs(parameter) + 150 * c.learning_rate);
}

class OptimizerOracleTest : public testing::TestWithParam<OptimizerCase> {};

TEST_P(OptimizerOracleTest, TwentyStepsMatchPytorch) {
  const OptimizerCase& c = GetParam();
  const double scale = 0.375;
  const std::string bytes = run_script("optimizer_oracle.py", oracle_arguments(c, scale));
  ASSERT_EQ(bytes.size(), sizeof(float) * kNumel * (1 + 2 * kSteps));
  const auto* oracle = reinterpret_cast<const float*>(bytes.data());

  const auto optimizer = make_optimizer(c.options, kNumel);
  const std::vector<ParamGroup> groups = {{"first", 1.0, c.weight_decay},
                                          {"second", 1.0, c.weight_decay}};
  const std::vector<GroupSegment> segments = {{0, 300, 0}, {300, kNumel, 1}};
  std::vector<float> master(oracle, oracle + kNumel);
  for (int step = 1; step <= kSteps; ++step) {
    const float* gradient = oracle + kNumel * (2 * step - 1);
    const float* expected = gradient + kNumel;
    optimizer->update({.master = master.data(),
                       .gradient = gradient,
                       .numel = kNumel,
                       .segments = segments,
                       .groups = groups},
                      {.learning_rate = c.learning_rate, .step = step, .gradient_scale = scale});
    for (int64_t i = 0; i < kNumel; ++i) {
      ASSERT_NEAR(master[static_cast<size_t>(i)], expected[i], tolerance(c, expected[i], step))
          << "step " << step << ", element " << i;
    }
  }
}

// An epsilon of the gradients' size, so that its place in the formula matters.
INSTANTIATE_TEST_SUITE_P(
    Options, OptimizerOracleTest,
    testing::Values(
        OptimizerCase{"AdamW", {.epsilon = 1e-3}, 1e-2, 0.1},
        OptimizerCase{"AdamWOfLlama", {.beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-5}, 1e-3, 0},
        OptimizerCase{"Sgd", {.kind = OptimizerKind::kSgd}, 0.5, 0.01},
        OptimizerCase{"SgdMomentum", {.kind = OptimizerKind::kSgd, .momentum = 0.9}, 0.5, 0.01},
        OptimizerCase{"SgdNesterov",
                      {.kind = OptimizerKind::kSgd, .momentum = 0.9, .nesterov = true},
                      0.5,
                      0}),
    [](const auto& info) { return info.param.name; });

TEST(ScheduleOracleTest, TablesEqualTransformers) {
  std::istringstream table(run_script("schedule_oracle.py", ""));
  int rows = 0;
  for (std::string line; std::getline(table, line); ++rows) {
    std::istringstream row(line);
    std::string kind;
    int64_t total = 0;
    double warmup = 0;
    row >> kind >> total >> warmup;
    const LrScheduleOptions options{
        .kind = lr_schedule_kind_from_name(kind), .learning_rate = 3e-4, .warmup_steps = warmup};
    for (int64_t step = 0; step < total; ++step) {
      std::string rate;
      row >> rate;
      EXPECT_DOUBLE_EQ(learning_rate(options, step, total), std::strtod(rate.c_str(), nullptr))
          << kind << " step " << step << " of " << total << ", warm-up " << warmup;
    }
  }
  EXPECT_EQ(rows, 24);
}

}  // namespace
}  // namespace fsdp::optim
