// The options of every sub-command of `finetune`. Names and defaults are those of Hugging Face's
// Trainer where it has them. Each struct lists its fields once; `check` refuses what contradicts
// itself, before any work.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/base/fields.h"
#include "libfsdp/optim/lr_schedule.h"

namespace fsdp::trainer {

enum class EvalStrategy { kNo, kSteps, kEpoch };
constexpr std::array<std::pair<EvalStrategy, std::string_view>, 3> names_of(EvalStrategy) {
  return {{{EvalStrategy::kNo, "no"},
           {EvalStrategy::kSteps, "steps"},
           {EvalStrategy::kEpoch, "epoch"}}};
}

enum class SaveStrategy { kNo, kSteps, kEpoch, kBest };
constexpr std::array<std::pair<SaveStrategy, std::string_view>, 4> names_of(SaveStrategy) {
  return {{{SaveStrategy::kNo, "no"},
           {SaveStrategy::kSteps, "steps"},
           {SaveStrategy::kEpoch, "epoch"},
           {SaveStrategy::kBest, "best"}}};
}

/// How the ranks share the work; train, eval and generate have it.
struct RankOptions {
  int64_t nproc_per_node = 1;
  std::string sharding_strategy = "FULL_SHARD";
  int64_t sharding_group_size = 0;
  std::optional<int64_t> gather_slots;
  std::optional<int64_t> kept_units;
  std::optional<double> memory_budget_gib;
  std::string offload = "none";
  bool deterministic = false;
  bool bf16 = false;
  bool fp16 = false;
  bool pure_bf16 = false;
  std::optional<double> peer_timeout;
  std::optional<double> ddp_timeout;
  std::filesystem::path config;

  /// "fp32", "bf16", "pure bf16" or "fp16".
  std::string precision() const;
  DType param_dtype() const;
  void check(const Origins& origins) const;

  template <class V>
  void fields(V& v);
};

/// How records become sequences; train, eval and show-data have it.
struct SequenceOptions {
  int64_t max_seq_length = 1024;
  bool packing = false;
  bool train_on_inputs = false;

  template <class V>
  void fields(V& v);
};

/// When checkpoints are made, which are kept, and what a run begins with.
struct CheckpointOptions {
  SaveStrategy save_strategy = SaveStrategy::kSteps;
  double save_steps = 500;
  std::optional<int64_t> save_total_limit;
  std::string fsdp_state_dict_type = "FULL_STATE_DICT";
  bool async_save = false;
  bool load_best_model_at_end = false;
  std::string metric_for_best_model;
  std::string greater_is_better;
  std::optional<int64_t> early_stopping_patience;
  double early_stopping_threshold = 0;
  std::string resume_from_checkpoint;
  std::vector<std::string> allow_changed_options;

  bool resumes() const;
  /// "eval_loss" or "perplexity"; empty when nobody asks which checkpoint is the best.
  std::string best_metric() const;
  bool greater_metric_is_better() const;

  template <class V>
  void fields(V& v);
};

/// Frozen weights in 4 or 8 bits, made when the model is loaded; train, eval and generate have it.
/// Names are those of TRL's ModelConfig.
struct QuantizationOptions {
  bool load_in_4bit = false;
  bool load_in_8bit = false;
  std::string bnb_4bit_quant_type;  ///< Empty = nf4.
  bool use_bnb_nested_quant = false;

  bool quantizes() const { return load_in_4bit || load_in_8bit; }
  void check(const Origins& origins) const;

  template <class V>
  void fields(V& v);
};

/// Adapters, and a base in 4 or 8 bits; train has it. Names and defaults are those of TRL's
/// ModelConfig, and of llama-recipes for what TRL lacks.
struct PeftOptions {
  bool use_peft = false;
  std::string peft_method = "lora";
  std::filesystem::path adapter_name_or_path;
  int64_t lora_r = 16;
  double lora_alpha = 32;
  double lora_dropout = 0.05;
  std::vector<std::string> lora_target_modules;
  std::vector<std::string> lora_modules_to_save;
  bool use_rslora = false;
  bool use_dora = false;
  std::string lora_bias = "none";
  std::string init_lora_weights = "default";
  double loraplus_lr_ratio = 1;
  int64_t num_virtual_tokens = 30;
  bool prefix_projection = false;
  int64_t adapter_len = 10;
  int64_t adapter_layers = 30;
  QuantizationOptions quantization;

  /// Whether adapters are trained.
  bool adapts() const { return use_peft || !adapter_name_or_path.empty(); }
  void check(const Origins& origins) const;

  template <class V>
  void fields(V& v);
};

/// Parts of the model that are not trained; train has it.
struct FreezeOptions {
  bool freeze_layers = false;
  int64_t num_freeze_layers = 1;
  std::vector<std::string> freeze_modules;
  std::vector<std::string> unfreeze_modules;

  bool freezes() const {
    return freeze_layers || !freeze_modules.empty() || !unfreeze_modules.empty();
  }
  void check(const Origins& origins, const PeftOptions& peft) const;

  template <class V>
  void fields(V& v);
};

struct TrainOptions {
  std::filesystem::path model_name_or_path;
  std::filesystem::path train_file;
  std::filesystem::path validation_file;
  std::filesystem::path output_dir;
  bool overwrite_output_dir = false;
  std::string save_dtype;
  SequenceOptions sequence;
  bool shuffle = true;
  int64_t per_device_train_batch_size = 8;
  int64_t per_device_eval_batch_size = 8;
  std::optional<int64_t> gradient_accumulation_steps;
  double num_train_epochs = 3;
  int64_t max_steps = -1;
  std::string optim = "adamw_torch";
  double learning_rate = 5e-5;
  double weight_decay = 0;
  double adam_beta1 = 0.9;
  double adam_beta2 = 0.999;
  double adam_epsilon = 1e-8;
  double momentum = 0;
  double max_grad_norm = 1.0;
  std::string grad_norm_type = "2";
  double max_grad_value = 0;
  std::string reduce_dtype;
  bool unsharded_accumulation = false;
  optim::LrScheduleKind lr_scheduler_type = optim::LrScheduleKind::kLinear;
  double warmup_steps = 0;
  double warmup_ratio = 0;
  double gamma = 0.85;
  int64_t seed = 42;
  int64_t logging_steps = 500;
  EvalStrategy eval_strategy = EvalStrategy::kNo;
  std::optional<int64_t> eval_steps;
  std::optional<int64_t> max_eval_samples;
  bool gradient_checkpointing = false;
  PeftOptions peft;
  FreezeOptions freezing;
  CheckpointOptions checkpoints;
  RankOptions ranks;

  template <class V>
  void fields(V& v);
  void check(const Origins& origins) const;

 private:
  void check_checkpoints(const Origins& origins) const;
};

struct EvalOptions {
  std::filesystem::path model_name_or_path;
  std::filesystem::path adapter_name_or_path;
  QuantizationOptions quantization;
  std::filesystem::path validation_file;
  std::filesystem::path output_dir;
  SequenceOptions sequence;
  int64_t per_device_eval_batch_size = 8;
  std::optional<int64_t> max_eval_samples;
  RankOptions ranks;

  template <class V>
  void fields(V& v);
  void check(const Origins& origins) const;
};

struct GenerateOptions {
  std::filesystem::path model_name_or_path;
  std::filesystem::path adapter_name_or_path;
  QuantizationOptions quantization;
  std::string prompt;
  std::filesystem::path prompt_file;
  std::string system;
  bool raw = false;
  int64_t max_new_tokens = 256;
  double temperature = 0;
  double top_p = 1;
  int64_t top_k = 0;
  std::vector<std::string> stop;
  int64_t seed = 42;
  bool json = false;
  RankOptions ranks;

  template <class V>
  void fields(V& v);
  void check(const Origins& origins) const;
};

struct MergeOptions {
  std::filesystem::path model_name_or_path;
  std::filesystem::path adapter_name_or_path;
  std::filesystem::path output_dir;
  std::string dequantize;
  std::string max_shard_size = "5GB";

  template <class V>
  void fields(V& v);
  void check(const Origins& origins) const;
};

struct ConvertOptions {
  std::filesystem::path from;
  std::filesystem::path to;
  std::string dtype = "auto";
  std::string format = "full";
  int64_t num_shards = 1;
  std::string max_shard_size = "5GB";
  std::string prefix;

  template <class V>
  void fields(V& v);
  void check(const Origins& origins) const;
};

struct NewModelOptions {
  std::filesystem::path model_config;
  std::filesystem::path tokenizer;
  std::filesystem::path output_dir;
  std::string dtype = "float32";
  int64_t seed = 42;

  template <class V>
  void fields(V& v);
  void check(const Origins& origins) const;
};

struct ShowDataOptions {
  std::filesystem::path model_name_or_path;
  std::filesystem::path train_file;
  SequenceOptions sequence;
  int64_t max_samples = 4;
  bool json = false;
  std::filesystem::path config;

  template <class V>
  void fields(V& v);
  void check(const Origins& origins) const;
};

struct VerifyOptions {
  std::filesystem::path dir;
  int64_t threads = 0;
  bool json = false;

  template <class V>
  void fields(V& v);
  void check(const Origins& origins) const;
};

struct EnvOptions {
  bool json = false;

  template <class V>
  void fields(V& v);
  void check(const Origins&) const {}
};

}  // namespace fsdp::trainer

#include "libfsdp/trainer/options_fields.h"
