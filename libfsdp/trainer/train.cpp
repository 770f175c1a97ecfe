#include "libfsdp/trainer/train.h"

#include <chrono>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/checkpoint_files.h"
#include "libfsdp/checkpoint/digest.h"
#include "libfsdp/io/file.h"
#include "libfsdp/lora/peft_files.h"
#include "libfsdp/optim/lr_schedule.h"
#include "libfsdp/shard/checkpointer.h"
#include "libfsdp/shard/state.h"
#include "libfsdp/trainer/data.h"
#include "libfsdp/trainer/evaluate.h"
#include "libfsdp/trainer/model_files.h"
#include "libfsdp/trainer/progress.h"
#include "libfsdp/trainer/report.h"
#include "libfsdp/trainer/run_state.h"
#include "libfsdp/trainer/session.h"
#include "libfsdp/trainer/signals.h"

namespace fsdp::trainer {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

optim::LrScheduleOptions schedule_of(const TrainOptions& options, int64_t steps_per_epoch) {
  optim::LrScheduleOptions schedule;
  schedule.kind = options.lr_scheduler_type;
  schedule.learning_rate = options.learning_rate;
  schedule.warmup_steps = options.warmup_steps;
  schedule.warmup_ratio = options.warmup_ratio;
  schedule.gamma = options.gamma;
  schedule.steps_per_epoch = steps_per_epoch;
  schedule.validate();
  return schedule;
}

DType save_dtype_of(const TrainOptions& options, const ModelFiles& files) {
  return options.save_dtype.empty() ? files.dtype : dtype_from_name(options.save_dtype);
}

constexpr int64_t kAdapterBytes = 64 << 20;  // Free space that a run of adapters asks for.

int64_t saved_bytes(const TrainOptions& options, const ModelFiles& files) {
  if (options.peft.adapts()) return kAdapterBytes;
  return files.parameters * static_cast<int64_t>(dtype_bytes(save_dtype_of(options, files)));
}

/// Everything that a run reads, opened and checked.
struct Inputs {
  ModelFiles files;
  SequenceData train;
  std::optional<SequenceData> validation;
};

Inputs open_inputs(const TrainOptions& options) {
  auto files = open_model(options.model_name_or_path);
  check_base(files, options.peft, true);
  files.config.check_context(options.sequence.max_seq_length);
  auto train = SequenceData::open(options.train_file, files.tokenizer,
                                  {.sequence = options.sequence,
                                   .batch_size = options.per_device_train_batch_size,
                                   .shuffle = options.shuffle,
                                   .seed = options.seed});
  std::optional<SequenceData> validation;
  if (!options.validation_file.empty()) {
    validation = SequenceData::open(options.validation_file, files.tokenizer,
                                    {.sequence = options.sequence,
                                     .batch_size = options.per_device_eval_batch_size,
                                     .max_records = options.max_eval_samples});
  }
  return {std::move(files), std::move(train), std::move(validation)};
}

/// Removes the checkpoints of a run whose folder may be overwritten.
void remove_checkpoints(const std::filesystem::path& directory) {
  for (const std::string& name : checkpoint::names_in(directory.string())) {
    if (checkpoint::step_of_name(name)) checkpoint::remove_checkpoint(directory.string(), name);
  }
  std::filesystem::remove(directory / checkpoint::kLatestFile);
}

void prepare(const TrainOptions& options, const ModelFiles& files) {
  prepare_output_dir(options.output_dir,
                     options.overwrite_output_dir || options.checkpoints.resumes(),
                     saved_bytes(options, files));
}

/// What the ranks tell each other at the end of a step.
struct Wishes {
  int64_t tokens = 0;
  int64_t end = 0;  // The signal that asked for it.
  int64_t save = 0;
};

/// One run: its state between steps, and the story from the first step to the saved model.
class TrainRun {
 public:
  TrainRun(const TrainOptions& options, const std::string& resolved_options,
           comm::Communicator& comm, Inputs inputs)
      : options_(options),
        resolved_options_(resolved_options),
        comm_(comm),
        inputs_(std::move(inputs)),
        plan_(StepPlan::make(options, inputs_.train.micro_batches(), comm.size())),
        schedule_(schedule_of(options, plan_.steps_per_epoch())),
        console_(comm.rank() != 0) {
    if (comm.rank() != 0) return;
    prepare(options, inputs_.files);
    if (!options.checkpoints.resumes()) remove_checkpoints(options.output_dir);
  }

  int run() {
    begin();
    announce();
    begin_ = Clock::now();
    requests_.ask();
    if (state_.evaluation_due && !end_step(true)) return stopped();
    while (state_.step < plan_.total_steps && !stops_early()) {
      train_step();
      if (!end_step(wants_evaluation())) return stopped();
    }
    checkpoints_->wait();
    tell_of_save();
    if (options_.checkpoints.load_best_model_at_end) load_best();
    finish();
    return 0;
  }

 private:
  // -------------------------------------------------------------------------------------------------------------------
  // The begin

  void begin() {
    model_.emplace(build_sharded(inputs_.files, comm_, shard_options(options_), Purpose::kTraining,
                                 options_.peft, parts_, options_.freezing));
    checkpoints_ = std::make_unique<Checkpointer>(*model_, checkpointer_options());
    identity_ = {
        .options = io::Json::parse(resolved_options_, "options"),
        .train_data = inputs_.train.digest(),
        .model = checkpoint::digest_of(inputs_.files.config.to_json(DType::kF32).dump()).hex(),
        .micro_batches_a_step = plan_.micro_batches_a_step,
        .ranks = plan_.ranks};
    checkpoints_->add(
        kRunObject, [this] { return state_text(); },
        [this](const std::string& text) {
          state_ = RunState::from_json(io::Json::parse(text, kRunObject)["progress"]);
        });
    const std::optional<std::string> from = find_checkpoint();
    if (!from || parts_.adapters) {  // Checkpoints of adapters hold no base.
      load_files(*model_, inputs_.files, parts_);
      fill_adapters(model_->core(), parts_, options_.peft, static_cast<uint64_t>(options_.seed));
    }
    if (from) {
      resume(*from);
    } else {
      if (comm_.rank() == 0) metrics_.emplace(options_.output_dir / "metrics.jsonl");
    }
  }

  CheckpointerOptions checkpointer_options() {
    const auto& wanted = options_.checkpoints;
    CheckpointerOptions made{.directory = options_.output_dir.string(),
                             .form = wanted.fsdp_state_dict_type == "FULL_STATE_DICT"
                                         ? StateForm::kFull
                                         : StateForm::kSharded,
                             .async = wanted.async_save,
                             .save_total_limit = wanted.save_total_limit.value_or(0),
                             .overwrite = true,
                             .state_file = "finetune_state.json"};
    if (!parts_.adapters) return made;
    made.model = [this](ShardedCore& core) { return parts_.adapters->state(core); };
    made.model_stem = "adapter_model";
    return made;
  }

  std::string state_text() const {
    return io::Json::object({{"progress", state_.json()}, {"identity", identity_.json()}}).dump();
  }

  std::optional<std::string> find_checkpoint() {
    const std::string& where = options_.checkpoints.resume_from_checkpoint;
    if (!options_.checkpoints.resumes()) return std::nullopt;
    const bool newest = where == "auto" || where == "true";
    const auto found = checkpoints_->find(newest ? "auto" : where);
    for (const std::string& note : checkpoints_->notes()) console_.line(note);
    if (found) return found;
    if (where == "true") {
      throw ConfigError(
          cat("[resume] there is no whole checkpoint in ", options_.output_dir.string(),
              ". Hint: --resume_from_checkpoint auto starts from the beginning then."));
    }
    console_.line(cat("[resume] there is no whole checkpoint in ", options_.output_dir.string(),
                      ": starting from the beginning"));
    return std::nullopt;
  }

  void resume(const std::string& from) {
    const io::Json stored = io::Json::parse(checkpoints_->stored_object(from, kRunObject), from);
    const RunIdentity saved = RunIdentity::from_json(stored["identity"]);
    const auto& allowed = options_.checkpoints.allow_changed_options;
    if (!options_.gradient_accumulation_steps) {
      plan_ = StepPlan::make(options_, inputs_.train.micro_batches(), comm_.size(),
                             saved.micro_batches_a_step);
      identity_.micro_batches_a_step = plan_.micro_batches_a_step;
      schedule_ = schedule_of(options_, plan_.steps_per_epoch());
    }
    identity_.ranks = plan_.counted_ranks = saved.ranks;
    refuse_differences(RunIdentity::compare(saved, identity_, allowed), from);
    checkpoints_->load(from);
    earlier_seconds_ = state_.seconds;
    console_.line(
        cat("resumed: ", from, ", ", state_.step, " of ", plan_.total_steps, " steps done"));
    if (comm_.rank() != 0) return;
    const auto metrics = options_.output_dir / "metrics.jsonl";
    const auto beside = std::filesystem::path(from).parent_path() / "metrics.jsonl";
    metrics_.emplace(metrics, std::filesystem::exists(metrics) ? metrics : beside, state_.step);
  }

  void announce() {
    console_.line(cat("model: ", options_.model_name_or_path.string(), ", ",
                      inputs_.files.config.model_type, ", ", inputs_.files.parameters,
                      " parameters, ", dtype_name(inputs_.files.dtype)));
    if (options_.ranks.offload != "none") {
      console_.line(cat("offload of ", options_.ranks.offload,
                        ": the ranks compute on the CPU, where they are anyway"));
    }
    if (parts_.adapters || options_.freezing.freezes())
      console_.line(trainable_line(model_->core(), parts_));
    if (parts_.quantized) {
      console_.line(cat("quantised: ", parts_.quantized->numel(), " weights in ",
                        parts_.quantized->bytes(), " bytes"));
    }
    console_.line(cat("train data: ", inputs_.train.summary()));
    if (inputs_.validation) console_.line(cat("validation data: ", inputs_.validation->summary()));
    console_.line(cat("run: ", plan_.total_steps, " steps on ", plan_.ranks, " ranks, ",
                      options_.ranks.sharding_strategy, ", ", options_.ranks.precision(), ", ",
                      plan_.micro_batches_a_step * options_.per_device_train_batch_size,
                      " sequences a step, results in ", options_.output_dir.string()));
  }

  // -------------------------------------------------------------------------------------------------------------------
  // A step

  void train_step() {
    const auto step_begin = Clock::now();
    const int64_t step_index = state_.step;
    const auto place = plan_.place(step_index);
    const int64_t rank = comm_.rank();
    const int64_t mine =
        place.first + rank < place.end ? ceil_div(place.end - place.first - rank, plan_.ranks) : 0;
    int64_t tokens = 0;
    auto step = model_->begin_step(mine);
    for (int64_t m = place.first + rank; m < place.end; m += plan_.ranks) {
      const auto batch = inputs_.train.micro_batch(place.epoch, m);
      tokens += batch.tokens();
      step.backward(model_->run([&](auto& lm) { return lm.loss(batch); }),
                    batch.trainable_tokens());
    }
    const auto rate = optim::learning_rate(schedule_, step_index, plan_.total_steps);
    const auto stats =
        step.finish({.learning_rate = rate,
                     .max_grad_norm = options_.max_grad_norm,
                     .norm_type = optim::norm_type_from_name(options_.grad_norm_type),
                     .clip_value = options_.max_grad_value});
    for (int64_t m = place.first; m < place.end; ++m) {
      state_.samples += inputs_.train.sequences_of(m);
    }
    record_step(stats, rate, agree(tokens), place.epoch_after, seconds_since(step_begin));
  }

  /// Brings together what the ranks were asked from outside; returns the sum of the tokens.
  int64_t agree(int64_t tokens) {
    const Wishes mine{tokens, requests_.end_signal(), requests_.take_save() ? 1 : 0};
    all_wishes_.resize(static_cast<size_t>(comm_.size()));
    comm_.exchange(&mine, sizeof(mine), all_wishes_.data(),
                   comm::make_tag("end of step", state_.step));
    int64_t sum = 0;
    for (const Wishes& one : all_wishes_) {
      sum += one.tokens;
      save_asked_ = save_asked_ || one.save != 0;
      if (end_asked_ == 0) end_asked_ = static_cast<int>(one.end);
    }
    if (end_asked_ != 0) requests_.note_end(end_asked_);
    return sum;
  }

  void record_step(const StepStats& stats, double rate, int64_t tokens, double epoch,
                   double seconds) {
    const StepRecord record{.step = stats.step,
                            .epoch = epoch,
                            .loss = stats.loss,
                            .grad_norm = stats.grad_norm,
                            .learning_rate = rate,
                            .tokens = tokens,
                            .trainable_tokens = stats.trainable_tokens,
                            .tokens_per_second = static_cast<double>(tokens) / seconds,
                            .step_seconds = seconds};
    state_.step = stats.step;
    state_.epoch = epoch;
    state_.tokens += tokens;
    if (stats.skipped) {
      console_.line(cat("step ", stats.step,
                        ": the gradient overflowed, so nothing was updated and "
                        "the loss is scaled by less from now on"));
    }
    if (std::isfinite(stats.loss)) {
      state_.loss_sum += stats.loss;
      state_.logged_loss += stats.loss;
    }
    ++state_.logged_steps;
    if (metrics_) metrics_->write(record);
    if (stats.step % options_.logging_steps == 0) {
      const double mean = state_.logged_loss / static_cast<double>(state_.logged_steps);
      console_.line(step_line(mean, record));
      state_.log(record, mean);
      state_.logged_loss = 0;
      state_.logged_steps = 0;
    }
    console_.progress({stats.step, plan_.total_steps, elapsed_seconds(), record.tokens_per_second,
                       stats.loss, rate},
                      stats.step == plan_.total_steps);
  }

  double elapsed_seconds() const { return earlier_seconds_ + seconds_since(begin_); }

  // -------------------------------------------------------------------------------------------------------------------
  // Between two steps

  /// Evaluates and saves what is due, and does what was asked from outside; returns false when the
  /// run is to end.
  bool end_step(bool evaluates) {
    bool new_best = false;
    if (evaluates) {
      const std::optional<bool> best = run_evaluation();
      state_.evaluation_due = !best;
      new_best = best.value_or(false);
    }
    bool saved = !state_.evaluation_due && wants_save(new_best);
    if (saved) save_checkpoint();
    checkpoints_->poll();
    tell_of_save();
    if (evaluates || saved) agree(0);
    if ((save_asked_ || end_asked_ != 0) && !std::exchange(saved, true)) save_checkpoint();
    save_asked_ = false;
    return end_asked_ == 0;
  }

  bool is_last_step() const { return state_.step == plan_.total_steps; }

  bool stops_early() const {
    const auto& patience = options_.checkpoints.early_stopping_patience;
    return patience && state_.patience_used >= *patience;
  }

  bool wants_evaluation() const {
    if (!inputs_.validation) return false;
    switch (options_.eval_strategy) {
      case EvalStrategy::kNo:
        return is_last_step();
      case EvalStrategy::kSteps:
        return is_last_step() ||
               state_.step % options_.eval_steps.value_or(options_.logging_steps) == 0;
      case EvalStrategy::kEpoch:
        return is_last_step() || state_.step % plan_.steps_per_epoch() == 0;
    }
    return false;
  }

  bool wants_save(bool new_best) const {
    switch (options_.checkpoints.save_strategy) {
      case SaveStrategy::kNo:
        return false;
      case SaveStrategy::kSteps:
        return is_last_step() || state_.step % save_steps() == 0;
      case SaveStrategy::kEpoch:
        return is_last_step() || state_.step % plan_.steps_per_epoch() == 0;
      case SaveStrategy::kBest:
        return new_best;
    }
    return false;
  }

  int64_t save_steps() const {
    const double every = options_.checkpoints.save_steps;
    if (every >= 1) return static_cast<int64_t>(every);
    return static_cast<int64_t>(std::ceil(every * static_cast<double>(plan_.total_steps)));
  }

  /// Whether its metric is the best so far; nothing when a signal ended it.
  std::optional<bool> run_evaluation() {
    comm_.report_progress(state_.step, "evaluate");
    auto done = evaluate(*model_, *inputs_.validation, [this] {
      agree(0);
      return end_asked_ != 0;
    });
    if (!done) return std::nullopt;
    EvalRecord& record = *done;
    record.step = state_.step;
    record.epoch = state_.epoch;
    if (metrics_) metrics_->write(record);
    console_.line(eval_line(record, true));
    state_.log(record);
    if (comm_.rank() == 0 && is_last_step()) write_eval_results(options_.output_dir, record);
    const std::string metric = options_.checkpoints.best_metric();
    if (metric.empty()) return false;
    return state_.note_metric(metric_of(record, metric),
                              options_.checkpoints.greater_metric_is_better(),
                              options_.checkpoints.early_stopping_threshold);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Checkpoints

  std::filesystem::path checkpoint_path(int64_t step) const {
    return options_.output_dir / checkpoint::checkpoint_name(step);
  }

  std::string trainer_state() const {
    const int64_t epoch_steps = plan_.steps_per_epoch();
    const bool best_is_there =
        state_.best_step == state_.step ||
        (state_.best_step >= 0 && std::filesystem::exists(checkpoint_path(state_.best_step)));
    return trainer_state_text(
        state_, {.max_steps = plan_.total_steps,
                 .logging_steps = options_.logging_steps,
                 .eval_steps = options_.eval_steps.value_or(options_.logging_steps),
                 .save_steps = save_steps(),
                 .train_batch_size = options_.per_device_train_batch_size,
                 .num_train_epochs = ceil_div(plan_.total_steps, epoch_steps),
                 .flops = 6.0 * static_cast<double>(inputs_.files.parameters) *
                          static_cast<double>(state_.tokens),
                 .best_checkpoint =
                     best_is_there ? checkpoint_path(state_.best_step).string() : std::string(),
                 .patience = options_.checkpoints.early_stopping_patience,
                 .threshold = options_.checkpoints.early_stopping_threshold});
  }

  void save_checkpoint() {
    checkpoints_->wait();  // Whether the best one is there is known then.
    tell_of_save();
    state_.seconds = elapsed_seconds();
    CheckpointExtras extras{.best_step = state_.best_step};
    if (comm_.rank() == 0) {
      for (auto& [name, text] : model_texts(inputs_.files, options_.ranks.param_dtype()))
        extras.files.push_back({name, text});
      if (parts_.adapters) {
        extras.files.push_back({"adapter_config.json", parts_.adapters->config_text()});
      }
      extras.files.push_back({"trainer_state.json", trainer_state()});
      extras.files.push_back({"finetune_options.json", resolved_options_});
    }
    checkpoints_->save(state_.step, extras);
    tell_of_save();
  }

  void tell_of_save() {
    if (checkpoints_->last_saved() == told_of_) return;
    told_of_ = checkpoints_->last_saved();
    console_.line(cat("checkpoint: ", told_of_));
  }

  int stopped() {
    checkpoints_->wait();
    tell_of_save();
    console_.wipe();
    console_.line(cat("stopped by ", signal_text(end_asked_), " after step ", state_.step, " of ",
                      plan_.total_steps, ". Go on with --resume_from_checkpoint auto (or ",
                      checkpoint_path(state_.step).string(), ")"));
    return static_cast<int>(ExitCode::kStoppedWithCheckpoint);
  }

  void load_best() {
    if (state_.best_step < 0 || state_.best_step == state_.step) return;
    const std::string path = checkpoint_path(state_.best_step).string();
    if (comm_.maximum(std::filesystem::exists(path) ? 0 : 1, "best checkpoint") != 0) {
      console_.line(
          cat("the best checkpoint, ", path, ", is gone: the final model is the last step's"));
      return;
    }
    checkpoints_->find(path);
    checkpoints_->load_model(path);
    console_.line(cat("the best model is that of ", path));
  }

  // -------------------------------------------------------------------------------------------------------------------
  // The end

  void finish() {
    console_.wipe();
    const RunSummary summary{.train_runtime = elapsed_seconds(),
                             .samples = state_.samples,
                             .steps = state_.step,
                             .train_loss = state_.loss_sum / static_cast<double>(state_.step),
                             .epoch = state_.epoch};
    console_.line(summary_line(summary));
    state_.log(summary);
    comm_.report_progress(state_.step, "save");
    const auto dtype = save_dtype_of(options_, inputs_.files);
    if (comm_.rank() == 0) {
      save_model_files(inputs_.files, dtype, options_.output_dir);
      io::write_text_atomic((options_.output_dir / "finetune_options.json").string(),
                            resolved_options_);
      io::write_text_atomic((options_.output_dir / "trainer_state.json").string(), trainer_state());
    }
    if (parts_.adapters) {
      lora::save_adapter(model_->core(), *parts_.adapters, options_.output_dir.string());
      console_.line(cat("saved: ", options_.output_dir.string(), " (adapter)"));
      return;
    }
    save_weights(model_->core(), options_.output_dir, dtype);
    console_.line(cat("saved: ", options_.output_dir.string(), " (", dtype_name(dtype), ")"));
  }

  static constexpr const char* kRunObject = "run";

  const TrainOptions& options_;
  const std::string& resolved_options_;
  comm::Communicator& comm_;
  SignalRequests requests_;
  Inputs inputs_;
  StepPlan plan_;
  optim::LrScheduleOptions schedule_;
  Console console_;
  ModelParts parts_;
  std::optional<ShardedLm> model_;
  std::unique_ptr<Checkpointer> checkpoints_;
  std::optional<MetricsFile> metrics_;  // Rank 0 only.
  RunIdentity identity_;
  RunState state_;
  double earlier_seconds_ = 0;  // Of the sessions before this one.
  Clock::time_point begin_{};
  std::vector<Wishes> all_wishes_;
  int end_asked_ = 0;  // The signal; equal on all ranks.
  bool save_asked_ = false;
  std::string told_of_;
};

}  // namespace

StepPlan StepPlan::make(const TrainOptions& options, int64_t micro_batches_per_epoch, int64_t ranks,
                        int64_t micro_batches_a_step) {
  const int64_t given = ranks * options.gradient_accumulation_steps.value_or(1);
  StepPlan plan{micro_batches_per_epoch, ranks,
                micro_batches_a_step > 0 ? micro_batches_a_step : given, 0, ranks};
  const auto by_epochs =
      std::ceil(options.num_train_epochs * static_cast<double>(plan.steps_per_epoch()));
  plan.total_steps = options.max_steps > 0 ? options.max_steps : static_cast<int64_t>(by_epochs);
  if (plan.total_steps < 1) throw ConfigError("[train] the options give no optimizer step.");
  return plan;
}

int64_t StepPlan::steps_per_epoch() const {
  return ceil_div(micro_batches_per_epoch, micro_batches_a_step);
}

StepPlan::Place StepPlan::place(int64_t step) const {
  Place place;
  place.epoch = step / steps_per_epoch();
  place.first = step % steps_per_epoch() * micro_batches_a_step;
  place.end = std::min(place.first + micro_batches_a_step, micro_batches_per_epoch);
  // Hugging Face counts a rank's micro-batches; ceil_div because ranks that have none left wait for
  // the others.
  const auto seen = static_cast<double>(ceil_div(place.end, counted_ranks));
  const auto all = static_cast<double>(ceil_div(micro_batches_per_epoch, counted_ranks));
  place.epoch_after = static_cast<double>(place.epoch) + seen / all;
  return place;
}

void check_train(const TrainOptions& options) {
  const auto inputs = open_inputs(options);
  StepPlan::make(options, inputs.train.micro_batches(), options.ranks.nproc_per_node);
  shard_options(options).optimizer.validate();
  check_adapter(options.peft);
  prepare(options, inputs.files);
}

int run_train(const TrainOptions& options, const std::string& resolved_options,
              comm::Communicator& comm) {
  return TrainRun(options, resolved_options, comm, open_inputs(options)).run();
}

}  // namespace fsdp::trainer
