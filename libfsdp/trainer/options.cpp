#include "libfsdp/trainer/options.h"

#include <cmath>

#include "libfsdp/base/error.h"

namespace fsdp::trainer {
namespace {

void require(const std::filesystem::path& value, std::string_view name) {
  if (value.empty())
    throw ConfigError(cat("[options] --", name, " is required and was not given."));
}

void refuse_pair(const Origins& origins, const std::string& a, const std::string& b,
                 std::string_view why) {
  throw ConfigError(
      cat("[options] ", origins.describe(a), " contradicts ", origins.describe(b), ": ", why, "."));
}

bool same_folder(const std::filesystem::path& a, const std::filesystem::path& b) {
  std::error_code ignored;
  return std::filesystem::equivalent(a, b, ignored);
}

}  // namespace

void TrainOptions::check(const Origins& origins) const {
  require(model_name_or_path, "model_name_or_path");
  require(train_file, "train_file");
  require(output_dir, "output_dir");
  if (max_steps == 0)
    throw ConfigError(cat("[options] ", origins.describe("max_steps"), ": 0 steps train nothing."));
  if (same_folder(model_name_or_path, output_dir)) {
    refuse_pair(origins, "output_dir", "model_name_or_path",
                "the source model would be overwritten");
  }
  if (eval_strategy != EvalStrategy::kNo && validation_file.empty()) {
    refuse_pair(origins, "eval_strategy", "validation_file", "there is nothing to evaluate on");
  }
  if (origins.given("max_eval_samples") && max_eval_samples && validation_file.empty()) {
    refuse_pair(origins, "max_eval_samples", "validation_file", "there is nothing to evaluate on");
  }
  if (eval_steps && eval_strategy != EvalStrategy::kSteps) {
    refuse_pair(origins, "eval_steps", "eval_strategy", "eval_steps needs eval_strategy=steps");
  }
  if (warmup_steps > 0 && warmup_ratio > 0) {
    refuse_pair(origins, "warmup_steps", "warmup_ratio", "give one of them");
  }
  if (warmup_steps >= 1 && warmup_steps != std::floor(warmup_steps)) {
    throw ConfigError(cat("[options] ", origins.describe("warmup_steps"), ": got ", warmup_steps,
                          ", expected a whole number of steps, or a share below 1."));
  }
  if (lr_scheduler_type == optim::LrScheduleKind::kConstant &&
      (warmup_steps > 0 || warmup_ratio > 0)) {
    refuse_pair(origins, "lr_scheduler_type", warmup_steps > 0 ? "warmup_steps" : "warmup_ratio",
                "the type `constant` has no warm-up; use constant_with_warmup");
  }
  if (origins.given("gamma") && lr_scheduler_type != optim::LrScheduleKind::kStep) {
    refuse_pair(origins, "gamma", "lr_scheduler_type", "only the type `step` has a gamma");
  }
  if (optim == "sgd") {
    for (const auto* name : {"adam_beta1", "adam_beta2", "adam_epsilon"}) {
      if (origins.given(name)) refuse_pair(origins, "optim", name, "sgd has no such number");
    }
  }
}

void EvalOptions::check(const Origins& origins) const {
  require(model_name_or_path, "model_name_or_path");
  require(validation_file, "validation_file");
  if (!output_dir.empty() && std::filesystem::exists(output_dir) &&
      !std::filesystem::is_directory(output_dir)) {
    throw ConfigError(cat("[options] ", origins.describe("output_dir"), ": ", output_dir.string(),
                          " exists and is not a folder."));
  }
}

void GenerateOptions::check(const Origins& origins) const {
  require(model_name_or_path, "model_name_or_path");
  if (!origins.given("prompt") && prompt_file.empty()) {
    throw ConfigError("[options] --prompt (or --prompt_file) is required and was not given.");
  }
  if (origins.given("prompt") && !prompt_file.empty()) {
    refuse_pair(origins, "prompt", "prompt_file", "give one of them");
  }
  if (raw && !system.empty())
    refuse_pair(origins, "raw", "system", "without a chat template there are no roles");
  if (temperature == 0 && (top_p < 1 || top_k > 0)) {
    refuse_pair(origins, top_p < 1 ? "top_p" : "top_k", "temperature",
                "at temperature 0 the likeliest token is always taken; give a temperature above 0");
  }
}

void ConvertOptions::check(const Origins&) const {
  require(from, "from");
  require(to, "to");
}

void NewModelOptions::check(const Origins&) const {
  require(model_config, "model_config");
  require(output_dir, "output_dir");
}

void ShowDataOptions::check(const Origins&) const {
  require(model_name_or_path, "model_name_or_path");
  require(train_file, "train_file");
}

}  // namespace fsdp::trainer
