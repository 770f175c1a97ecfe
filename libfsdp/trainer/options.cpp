#include "libfsdp/trainer/options.h"

#include <cmath>

#include "libfsdp/base/error.h"
#include "libfsdp/io/hf_weights.h"
#include "libfsdp/optim/optimizer.h"

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

std::string RankOptions::precision() const {
  if (pure_bf16) return "pure bf16";
  if (fp16) return "fp16";
  return bf16 ? "bf16" : "fp32";
}

DType RankOptions::param_dtype() const {
  if (fp16) return DType::kF16;
  return bf16 || pure_bf16 ? DType::kBF16 : DType::kF32;
}

void RankOptions::check(const Origins& origins) const {
  const char* const why = "choose one precision";
  if (fp16 && bf16) refuse_pair(origins, "fp16", "bf16", why);
  if (fp16 && pure_bf16) refuse_pair(origins, "fp16", "pure_bf16", why);
  if (bf16 && pure_bf16) refuse_pair(origins, "bf16", "pure_bf16", why);
  if (sharding_group_size > 0 && !sharding_strategy.starts_with("HYBRID_SHARD"))
    refuse_pair(origins, "sharding_group_size", "sharding_strategy",
                "only HYBRID_SHARD has sharding groups");
  if (memory_budget_gib && kept_units)
    refuse_pair(origins, "memory_budget_gib", "kept_units", "the budget chooses how many are kept");
}

bool CheckpointOptions::resumes() const {
  return !resume_from_checkpoint.empty() && resume_from_checkpoint != "false";
}

std::string CheckpointOptions::best_metric() const {
  const bool wanted = load_best_model_at_end || early_stopping_patience.has_value() ||
                      save_strategy == SaveStrategy::kBest;
  if (metric_for_best_model.empty()) return wanted ? "eval_loss" : "";
  return metric_for_best_model.ends_with("loss") ? "eval_loss" : "perplexity";
}

bool CheckpointOptions::greater_metric_is_better() const { return greater_is_better == "true"; }

void TrainOptions::check_checkpoints(const Origins& origins) const {
  const CheckpointOptions& c = checkpoints;
  if (c.save_steps >= 1 && c.save_steps != std::floor(c.save_steps)) {
    throw ConfigError(cat("[options] ", origins.describe("save_steps"), ": got ", c.save_steps,
                          ", expected a whole number of steps, or a share below 1."));
  }
  const bool evaluates = eval_strategy != EvalStrategy::kNo;
  const auto needs_evaluation = [&](const char* name) {
    if (!evaluates)
      refuse_pair(origins, name, "eval_strategy", "nothing is evaluated while the run lasts");
  };
  if (c.save_strategy == SaveStrategy::kBest) needs_evaluation("save_strategy");
  if (c.early_stopping_patience) needs_evaluation("early_stopping_patience");
  if (origins.given("early_stopping_threshold") && !c.early_stopping_patience) {
    refuse_pair(origins, "early_stopping_threshold", "early_stopping_patience",
                "nothing is stopped early");
  }
  if (!c.load_best_model_at_end || c.save_strategy == SaveStrategy::kBest) return;
  needs_evaluation("load_best_model_at_end");
  const bool by_steps = eval_strategy == EvalStrategy::kSteps;
  if (c.save_strategy != (by_steps ? SaveStrategy::kSteps : SaveStrategy::kEpoch)) {
    refuse_pair(
        origins, "load_best_model_at_end", "save_strategy",
        "a checkpoint must be saved when it is evaluated; use the strategy of eval_strategy "
        "or save_strategy=best");
  }
  const auto every = static_cast<double>(eval_steps.value_or(logging_steps));
  if (by_steps && (c.save_steps < 1 || std::fmod(c.save_steps, every) != 0)) {
    refuse_pair(origins, "load_best_model_at_end", "save_steps",
                cat("it must be a multiple of eval_steps, ", every));
  }
}

void QuantizationOptions::check(const Origins& origins) const {
  if (load_in_4bit && load_in_8bit)
    refuse_pair(origins, "load_in_4bit", "load_in_8bit", "choose one");
  for (const char* name : {"bnb_4bit_quant_type", "use_bnb_nested_quant"}) {
    if (origins.given(name) && !load_in_4bit)
      refuse_pair(origins, name, "load_in_4bit", "nothing is made 4 bits");
  }
}

void PeftOptions::check(const Origins& origins) const {
  const auto needs_adapters = [&](const char* name) {
    if (origins.given(name) && !adapts())
      refuse_pair(origins, name, "use_peft", "all weights are trained, and there are no adapters");
  };
  needs_adapters("peft_method");
  struct Owned {
    const char* name;
    const char* method;
  };
  for (const auto& [name, method] :
       {Owned{"lora_r", "lora"}, Owned{"lora_alpha", "lora"}, Owned{"lora_dropout", "lora"},
        Owned{"lora_target_modules", "lora"}, Owned{"lora_modules_to_save", "lora"},
        Owned{"use_rslora", "lora"}, Owned{"use_dora", "lora"}, Owned{"lora_bias", "lora"},
        Owned{"init_lora_weights", "lora"}, Owned{"loraplus_lr_ratio", "lora"},
        Owned{"num_virtual_tokens", "prefix"}, Owned{"prefix_projection", "prefix"},
        Owned{"adapter_len", "llama_adapter"}, Owned{"adapter_layers", "llama_adapter"}}) {
    needs_adapters(name);
    if (origins.given(name) && adapter_name_or_path.empty() && peft_method != method)
      refuse_pair(origins, name, "peft_method", cat("it is an option of ", method));
  }
  for (const char* name :
       {"peft_method", "lora_r", "lora_alpha", "lora_target_modules", "lora_modules_to_save",
        "use_rslora", "use_dora", "lora_bias", "init_lora_weights", "num_virtual_tokens",
        "prefix_projection", "adapter_len", "adapter_layers"}) {
    if (origins.given(name) && !adapter_name_or_path.empty())
      refuse_pair(origins, name, "adapter_name_or_path", "the adapter's folder says that");
  }
  quantization.check(origins);
  if (quantization.quantizes() && !adapts()) {
    refuse_pair(origins, quantization.load_in_4bit ? "load_in_4bit" : "load_in_8bit", "use_peft",
                "quantised weights cannot be trained, only adapters beside them");
  }
}

void FreezeOptions::check(const Origins& origins, const PeftOptions& peft) const {
  for (const char* name : {"freeze_layers", "freeze_modules", "unfreeze_modules"}) {
    if (freezes() && origins.given(name) && peft.adapts()) {
      refuse_pair(origins, name, "use_peft",
                  "the model beside adapters is frozen; lora_modules_to_save are trained");
    }
  }
  if (origins.given("num_freeze_layers") && !freeze_layers)
    refuse_pair(origins, "num_freeze_layers", "freeze_layers", "no layers are frozen");
}

void TrainOptions::check(const Origins& origins) const {
  ranks.check(origins);
  peft.check(origins);
  freezing.check(origins, peft);
  const auto kind = optim::optimizer_kind_from_name(optim);
  if (ranks.pure_bf16 && origins.given("optim") &&
      kind != optim::OptimizerKind::kAnyPrecisionAdamW) {
    refuse_pair(origins, "optim", "pure_bf16",
                "weights of 16 bits need AnyPrecision's compensation; use anyprecision");
  }
  if (momentum > 0 && kind != optim::OptimizerKind::kSgd)
    refuse_pair(origins, "momentum", "optim", "only sgd has a momentum");
  if (unsharded_accumulation && ranks.deterministic) {
    refuse_pair(origins, "unsharded_accumulation", "deterministic",
                "the order of its sums depends on the number of ranks");
  }
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
  check_checkpoints(origins);
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
  ranks.check(origins);
  quantization.check(origins);
  require(model_name_or_path, "model_name_or_path");
  require(validation_file, "validation_file");
  if (!output_dir.empty() && std::filesystem::exists(output_dir) &&
      !std::filesystem::is_directory(output_dir)) {
    throw ConfigError(cat("[options] ", origins.describe("output_dir"), ": ", output_dir.string(),
                          " exists and is not a folder."));
  }
}

void GenerateOptions::check(const Origins& origins) const {
  ranks.check(origins);
  quantization.check(origins);
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

void MergeOptions::check(const Origins& origins) const {
  require(model_name_or_path, "model_name_or_path");
  require(adapter_name_or_path, "adapter_name_or_path");
  require(output_dir, "output_dir");
  io::parse_bytes(max_shard_size);
  if (same_folder(model_name_or_path, output_dir))
    refuse_pair(origins, "output_dir", "model_name_or_path", "the base would be overwritten");
}

void ConvertOptions::check(const Origins& origins) const {
  require(from, "from");
  require(to, "to");
  io::parse_bytes(max_shard_size);
  if (num_shards > 1 && format == "full")
    refuse_pair(origins, "num_shards", "format", "the full format has no shards; say sharded");
}

void NewModelOptions::check(const Origins&) const {
  require(model_config, "model_config");
  require(output_dir, "output_dir");
}

void VerifyOptions::check(const Origins&) const { require(dir, "dir"); }

void ShowDataOptions::check(const Origins&) const {
  require(model_name_or_path, "model_name_or_path");
  require(train_file, "train_file");
}

}  // namespace fsdp::trainer
