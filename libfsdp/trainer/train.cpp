#include "libfsdp/trainer/train.h"

#include <chrono>
#include <cmath>
#include <optional>

#include "libfsdp/base/error.h"
#include "libfsdp/io/file.h"
#include "libfsdp/optim/lr_schedule.h"
#include "libfsdp/shard/state.h"
#include "libfsdp/trainer/data.h"
#include "libfsdp/trainer/evaluate.h"
#include "libfsdp/trainer/model_files.h"
#include "libfsdp/trainer/progress.h"
#include "libfsdp/trainer/report.h"
#include "libfsdp/trainer/session.h"

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

int64_t saved_bytes(const TrainOptions& options, const ModelFiles& files) {
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

/// One run: its state between steps, and the story from the first step to the saved model.
class TrainRun {
 public:
  TrainRun(const TrainOptions& options, comm::Communicator& comm, Inputs inputs)
      : options_(options),
        comm_(comm),
        inputs_(std::move(inputs)),
        plan_(StepPlan::make(options, inputs_.train.micro_batches(), comm.size())),
        schedule_(schedule_of(options, plan_.steps_per_epoch())),
        console_(comm.rank() != 0) {
    if (comm.rank() != 0) return;
    prepare_output_dir(options.output_dir, options.overwrite_output_dir,
                       saved_bytes(options, inputs_.files));
    metrics_.emplace(options.output_dir / "metrics.jsonl");
  }

  void run(const std::string& resolved_options) {
    announce();
    auto model = load_sharded(inputs_.files, comm_, shard_options(options_), Purpose::kTraining);
    begin_ = Clock::now();
    for (int64_t step = 0; step < plan_.total_steps; ++step) {
      train_step(model, step);
      if (wants_evaluation(step)) run_evaluation(model, step);
    }
    console_.wipe();
    console_.line(summary_line(summary()));
    save(model, resolved_options);
  }

 private:
  void announce() {
    console_.line(cat("model: ", options_.model_name_or_path.string(), ", ",
                      inputs_.files.config.model_type, ", ", inputs_.files.parameters,
                      " parameters, ", dtype_name(inputs_.files.dtype)));
    console_.line(cat("train data: ", inputs_.train.summary()));
    if (inputs_.validation) console_.line(cat("validation data: ", inputs_.validation->summary()));
    console_.line(cat("run: ", plan_.total_steps, " steps on ", plan_.ranks, " ranks, ",
                      options_.ranks.sharding_strategy, ", ", options_.ranks.precision(), ", ",
                      plan_.ranks * plan_.accumulation * options_.per_device_train_batch_size,
                      " sequences a step, results in ", options_.output_dir.string()));
  }

  void train_step(ShardedLm& model, int64_t step_index) {
    const auto step_begin = Clock::now();
    const auto place = plan_.place(step_index);
    const int64_t rank = comm_.rank();
    const int64_t mine =
        place.first + rank < place.end ? ceil_div(place.end - place.first - rank, plan_.ranks) : 0;
    int64_t tokens = 0;
    auto step = model.begin_step(mine);
    for (int64_t m = place.first + rank; m < place.end; m += plan_.ranks) {
      const auto batch = inputs_.train.micro_batch(place.epoch, m);
      tokens += batch.tokens();
      step.backward(model.run([&](auto& lm) { return lm.loss(batch); }), batch.trainable_tokens());
    }
    const auto rate = optim::learning_rate(schedule_, step_index, plan_.total_steps);
    const auto stats =
        step.finish({.learning_rate = rate,
                     .max_grad_norm = options_.max_grad_norm,
                     .norm_type = optim::norm_type_from_name(options_.grad_norm_type),
                     .clip_value = options_.max_grad_value});
    for (int64_t m = place.first; m < place.end; ++m) {
      samples_ += inputs_.train.sequences_of(m);
    }
    record_step(stats, rate, comm_.sum(tokens, "tokens"), place.epoch_after,
                seconds_since(step_begin));
  }

  void record_step(const StepStats& stats, double rate, int64_t tokens, double epoch,
                   double seconds) {
    last_ = {.step = stats.step,
             .epoch = epoch,
             .loss = stats.loss,
             .grad_norm = stats.grad_norm,
             .learning_rate = rate,
             .tokens = tokens,
             .trainable_tokens = stats.trainable_tokens,
             .tokens_per_second = static_cast<double>(tokens) / seconds,
             .step_seconds = seconds};
    if (stats.skipped) {
      console_.line(cat("step ", stats.step,
                        ": the gradient overflowed, so nothing was updated and "
                        "the loss is scaled by less from now on"));
    }
    loss_sum_ += stats.loss;
    logged_loss_ += stats.loss;
    ++logged_steps_;
    if (metrics_) metrics_->write(last_);
    if (stats.step % options_.logging_steps == 0) {
      console_.line(step_line(logged_loss_ / static_cast<double>(logged_steps_), last_));
      logged_loss_ = 0;
      logged_steps_ = 0;
    }
    console_.progress({stats.step, plan_.total_steps, seconds_since(begin_),
                       last_.tokens_per_second, stats.loss, rate},
                      stats.step == plan_.total_steps);
  }

  bool wants_evaluation(int64_t step_index) const {
    if (!inputs_.validation) return false;
    const auto step = step_index + 1;
    const bool last = step == plan_.total_steps;
    switch (options_.eval_strategy) {
      case EvalStrategy::kNo:
        return last;
      case EvalStrategy::kSteps:
        return last || step % options_.eval_steps.value_or(options_.logging_steps) == 0;
      case EvalStrategy::kEpoch:
        return last || step % plan_.steps_per_epoch() == 0;
    }
    return false;
  }

  void run_evaluation(ShardedLm& model, int64_t step_index) {
    comm_.report_progress(step_index + 1, "evaluate");
    auto record = evaluate(model, *inputs_.validation);
    record.step = step_index + 1;
    record.epoch = last_.epoch;
    if (metrics_) metrics_->write(record);
    console_.line(eval_line(record, true));
    if (comm_.rank() == 0 && record.step == plan_.total_steps)
      write_eval_results(options_.output_dir, record);
  }

  RunSummary summary() const {
    return {.train_runtime = seconds_since(begin_),
            .samples = samples_,
            .steps = plan_.total_steps,
            .train_loss = loss_sum_ / static_cast<double>(plan_.total_steps),
            .epoch = last_.epoch};
  }

  void save(ShardedLm& model, const std::string& resolved_options) {
    comm_.report_progress(last_.step, "save");
    const auto dtype = save_dtype_of(options_, inputs_.files);
    if (comm_.rank() == 0) {
      save_model_files(inputs_.files, dtype, options_.output_dir);
      io::write_text_atomic((options_.output_dir / "finetune_options.json").string(),
                            resolved_options);
    }
    save_weights(model.core(), options_.output_dir, dtype);
    console_.line(cat("saved: ", options_.output_dir.string(), " (", dtype_name(dtype), ")"));
  }

  const TrainOptions& options_;
  comm::Communicator& comm_;
  Inputs inputs_;
  StepPlan plan_;
  optim::LrScheduleOptions schedule_;
  Console console_;
  std::optional<MetricsFile> metrics_;  // Rank 0 only.
  Clock::time_point begin_{};
  StepRecord last_;
  double loss_sum_ = 0;
  double logged_loss_ = 0;
  int64_t logged_steps_ = 0;
  int64_t samples_ = 0;
};

}  // namespace

StepPlan StepPlan::make(const TrainOptions& options, int64_t micro_batches_per_epoch,
                        int64_t ranks) {
  StepPlan plan{micro_batches_per_epoch, ranks, options.gradient_accumulation_steps, 0};
  const auto by_epochs =
      std::ceil(options.num_train_epochs * static_cast<double>(plan.steps_per_epoch()));
  plan.total_steps = options.max_steps > 0 ? options.max_steps : static_cast<int64_t>(by_epochs);
  if (plan.total_steps < 1) throw ConfigError("[train] the options give no optimizer step.");
  return plan;
}

int64_t StepPlan::steps_per_epoch() const {
  return ceil_div(micro_batches_per_epoch, ranks * accumulation);
}

StepPlan::Place StepPlan::place(int64_t step) const {
  Place place;
  place.epoch = step / steps_per_epoch();
  place.first = step % steps_per_epoch() * ranks * accumulation;
  place.end = std::min(place.first + ranks * accumulation, micro_batches_per_epoch);
  // Hugging Face counts a rank's micro-batches; ceil_div because ranks that have none left wait for
  // the others.
  const auto seen = static_cast<double>(ceil_div(place.end, ranks));
  const auto all = static_cast<double>(ceil_div(micro_batches_per_epoch, ranks));
  place.epoch_after = static_cast<double>(place.epoch) + seen / all;
  return place;
}

void check_train(const TrainOptions& options) {
  const auto inputs = open_inputs(options);
  StepPlan::make(options, inputs.train.micro_batches(), options.ranks.nproc_per_node);
  shard_options(options).optimizer.validate();
  prepare_output_dir(options.output_dir, options.overwrite_output_dir,
                     saved_bytes(options, inputs.files));
}

void run_train(const TrainOptions& options, const std::string& resolved_options,
               comm::Communicator& comm) {
  TrainRun(options, comm, open_inputs(options)).run(resolved_options);
}

}  // namespace fsdp::trainer
