#include "libfsdp/trainer/run_state.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>

#include "libfsdp/base/error.h"

namespace fsdp::trainer {
namespace {

/// Options that may always differ from those of the run that is resumed.
constexpr std::array kFree = {
    // Paths; what is in the files is compared apart.
    "model_name_or_path", "train_file", "validation_file", "output_dir", "overwrite_output_dir",
    "save_dtype", "config",
    // Logging, evaluation and saving.
    "logging_steps", "eval_strategy", "eval_steps", "max_eval_samples",
    "per_device_eval_batch_size", "save_strategy", "save_steps", "save_total_limit",
    "fsdp_state_dict_type", "async_save", "load_best_model_at_end", "early_stopping_patience",
    "early_stopping_threshold", "resume_from_checkpoint", "allow_changed_options",
    // How the work is divided; micro-batches of a step are compared apart.
    "nproc_per_node", "sharding_strategy", "sharding_group_size", "gather_slots", "kept_units",
    "offload", "memory_budget_gib", "gradient_checkpointing", "gradient_accumulation_steps",
    "peer_timeout", "ddp_timeout"};

bool contains(const auto& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

io::Json number_or_null(double value) {
  return std::isfinite(value) ? io::Json(value) : io::Json(nullptr);
}

io::Json optional_json(const auto& value) { return value ? io::Json(*value) : io::Json(nullptr); }

std::string value_text(const io::Json& value) {
  return value.is_string() ? (value.as_string().empty() ? "none" : value.as_string())
         : value.is_null() ? "none"
                           : value.dump();
}

}  // namespace

io::Json RunState::json() const {
  return io::Json::object({{"step", step},
                           {"epoch", epoch},
                           {"loss_sum", loss_sum},
                           {"logged_loss", logged_loss},
                           {"logged_steps", logged_steps},
                           {"samples", samples},
                           {"tokens", tokens},
                           {"seconds", seconds},
                           {"best_metric", optional_json(best_metric)},
                           {"best_step", best_step},
                           {"patience_used", patience_used},
                           {"evaluation_due", evaluation_due},
                           {"log_history", log_history}});
}

RunState RunState::from_json(const io::Json& json) {
  RunState state;
  state.step = json.get<int64_t>("step");
  state.epoch = json.get<double>("epoch");
  state.loss_sum = json.get<double>("loss_sum");
  state.logged_loss = json.get<double>("logged_loss");
  state.logged_steps = json.get<int64_t>("logged_steps");
  state.samples = json.get<int64_t>("samples");
  state.tokens = json.get<int64_t>("tokens");
  state.seconds = json.get<double>("seconds");
  if (!json["best_metric"].is_null()) state.best_metric = json.get<double>("best_metric");
  state.best_step = json.get<int64_t>("best_step");
  state.patience_used = json.get<int64_t>("patience_used");
  state.evaluation_due = json.get<bool>("evaluation_due");
  state.log_history = json["log_history"];
  return state;
}

void RunState::log(const StepRecord& record, double mean_loss) {
  log_history.push_back(io::Json::object({{"epoch", record.epoch},
                                          {"grad_norm", number_or_null(record.grad_norm)},
                                          {"learning_rate", record.learning_rate},
                                          {"loss", number_or_null(mean_loss)},
                                          {"step", record.step}}));
}

void RunState::log(const EvalRecord& record) {
  const auto rate =
      record.eval_runtime > 0 ? static_cast<double>(record.eval_samples) / record.eval_runtime : 0;
  log_history.push_back(io::Json::object({{"epoch", record.epoch},
                                          {"eval_loss", record.eval_loss},
                                          {"eval_perplexity", record.perplexity},
                                          {"eval_runtime", python_round(record.eval_runtime, 4)},
                                          {"eval_samples_per_second", python_round(rate, 3)},
                                          {"step", record.step}}));
}

void RunState::log(const RunSummary& summary) {
  const auto rate = [&](int64_t amount) {
    return summary.train_runtime > 0
               ? python_round(static_cast<double>(amount) / summary.train_runtime, 3)
               : 0.0;
  };
  log_history.push_back(io::Json::object({{"epoch", summary.epoch},
                                          {"step", summary.steps},
                                          {"train_loss", number_or_null(summary.train_loss)},
                                          {"train_runtime", python_round(summary.train_runtime, 4)},
                                          {"train_samples_per_second", rate(summary.samples)},
                                          {"train_steps_per_second", rate(summary.steps)}}));
}

bool RunState::note_metric(double value, bool greater_is_better, double threshold) {
  const bool better =
      !best_metric || (greater_is_better ? value > *best_metric : value < *best_metric);
  const bool clearly = !best_metric || (better && std::abs(value - *best_metric) > threshold);
  patience_used = clearly ? 0 : patience_used + 1;
  if (!better) return false;
  best_metric = value;
  best_step = step;
  return true;
}

double metric_of(const EvalRecord& record, const std::string& name) {
  return name == "perplexity" ? record.perplexity : record.eval_loss;
}

std::string trainer_state_text(const RunState& state, const TrainerStateFacts& facts) {
  io::Json callbacks = io::Json::object();
  if (facts.patience) {
    callbacks["EarlyStoppingCallback"] = io::Json::object(
        {{"args", io::Json::object({{"early_stopping_patience", *facts.patience},
                                    {"early_stopping_threshold", facts.threshold}})},
         {"attributes",
          io::Json::object({{"early_stopping_patience_counter", state.patience_used}})}});
  }
  const bool ends = state.step >= facts.max_steps;
  callbacks["TrainerControl"] =
      io::Json::object({{"args", io::Json::object({{"should_epoch_stop", false},
                                                   {"should_evaluate", false},
                                                   {"should_log", false},
                                                   {"should_save", true},
                                                   {"should_training_stop", ends}})},
                        {"attributes", io::Json::object()}});
  // The order of the keys is theirs: sorted.
  return io::Json::object(
             {{"best_global_step", state.best_step < 0 ? io::Json() : io::Json(state.best_step)},
              {"best_metric", optional_json(state.best_metric)},
              {"best_model_checkpoint",
               facts.best_checkpoint.empty() ? io::Json() : io::Json(facts.best_checkpoint)},
              {"epoch", state.epoch},
              {"eval_steps", facts.eval_steps},
              {"global_step", state.step},
              {"is_hyper_param_search", false},
              {"is_local_process_zero", true},
              {"is_world_process_zero", true},
              {"log_history", state.log_history},
              {"logging_steps", facts.logging_steps},
              {"max_steps", facts.max_steps},
              {"num_input_tokens_seen", state.tokens},
              {"num_train_epochs", facts.num_train_epochs},
              {"save_steps", facts.save_steps},
              {"stateful_callbacks", callbacks},
              {"total_flos", facts.flops},
              {"train_batch_size", facts.train_batch_size},
              {"trial_name", nullptr},
              {"trial_params", nullptr}})
             .dump(2) +
         "\n";
}

io::Json RunIdentity::json() const {
  return io::Json::object({{"options", options},
                           {"train_data", train_data},
                           {"model", model},
                           {"micro_batches_a_step", micro_batches_a_step},
                           {"ranks", ranks}});
}

RunIdentity RunIdentity::from_json(const io::Json& json) {
  return {.options = json["options"],
          .train_data = json.get<std::string>("train_data"),
          .model = json.get<std::string>("model"),
          .micro_batches_a_step = json.get<int64_t>("micro_batches_a_step"),
          .ranks = json.get<int64_t>("ranks")};
}

std::vector<Difference> RunIdentity::compare(const RunIdentity& saved, const RunIdentity& now,
                                             const std::vector<std::string>& allowed) {
  std::vector<Difference> differences;
  const auto note = [&](const std::string& name, const std::string& was, const std::string& is) {
    if (was != is && !contains(allowed, name)) differences.push_back({name, was, is});
  };
  for (const io::JsonMember& option : now.options.items()) {
    const io::Json* was = saved.options.find(option.key);
    if (was && !contains(kFree, option.key))
      note(option.key, value_text(*was), value_text(option.value));
  }
  note("model_name_or_path", cat("configuration ", saved.model), cat("configuration ", now.model));
  note("train_file", cat("tokens ", saved.train_data), cat("tokens ", now.train_data));
  note("gradient_accumulation_steps", cat(saved.micro_batches_a_step, " micro-batches a step"),
       cat(now.micro_batches_a_step, " micro-batches a step"));
  return differences;
}

void refuse_differences(const std::vector<Difference>& differences, const std::string& checkpoint) {
  if (differences.empty()) return;
  std::string list, names;
  for (const Difference& one : differences) {
    list +=
        cat(list.empty() ? "" : "; ", one.name, " (saved: ", one.saved, ", now: ", one.now, ")");
    names += cat(names.empty() ? "" : ",", one.name);
  }
  throw ConfigError(cat("[resume] ", checkpoint, " was made by a run with other options: ", list,
                        ". Hint: give them as they were, or --allow_changed_options ", names, "."));
}

}  // namespace fsdp::trainer
