// What a run knows between two steps besides tensors, and how checkpoints keep it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "libfsdp/io/json.h"
#include "libfsdp/trainer/options.h"
#include "libfsdp/trainer/report.h"

namespace fsdp::trainer {

/// Counters and averages of a run; equal on all ranks, but for the seconds. A plain value.
struct RunState {
  int64_t step = 0;
  double epoch = 0;
  double loss_sum = 0;     ///< Of the steps' losses.
  double logged_loss = 0;  ///< Of those since the last line.
  int64_t logged_steps = 0;
  int64_t samples = 0;
  int64_t tokens = 0;
  double seconds = 0;  ///< Of all sessions.
  std::optional<double> best_metric;
  int64_t best_step = -1;  ///< -1 = none.
  int64_t patience_used = 0;
  bool evaluation_due = false;  ///< The run was stopped in the evaluation of this step.
  io::Json log_history = io::Json::array();  ///< As in trainer_state.json.

  io::Json json() const;
  static RunState from_json(const io::Json& json);

  void log(const StepRecord& record, double mean_loss);
  void log(const EvalRecord& record);
  void log(const RunSummary& summary);

  /// Takes an evaluation into account, as transformers does: returns whether its metric is the best
  /// so far, and counts how often in a row it was not better by more than `threshold`.
  bool note_metric(double value, bool greater_is_better, double threshold);
};

/// The metric called "eval_loss" or "perplexity".
double metric_of(const EvalRecord& record, const std::string& name);

/// What trainer_state.json says that RunState does not.
struct TrainerStateFacts {
  int64_t max_steps = 0;
  int64_t logging_steps = 0;
  int64_t eval_steps = 0;
  int64_t save_steps = 0;
  int64_t train_batch_size = 0;
  int64_t num_train_epochs = 0;
  double flops = 0;
  std::string best_checkpoint;  ///< Path; empty = none.
  std::optional<int64_t> patience;
  double threshold = 0;
};

/// trainer_state.json with the keys and in the form of transformers.
std::string trainer_state_text(const RunState& state, const TrainerStateFacts& facts);

/// A setting that is not what it was.
struct Difference {
  std::string name;
  std::string saved;
  std::string now;
};

/// What two runs must have in common for one to go on with the other's state.
struct RunIdentity {
  io::Json options;                  ///< All options by name.
  std::string train_data;            ///< Digest of the training set's tokens.
  std::string model;                 ///< Digest of the model's configuration.
  int64_t micro_batches_a_step = 0;  ///< Over all ranks.
  int64_t ranks = 1;  ///< Of the first session, for the count of epochs; not compared.

  io::Json json() const;
  static RunIdentity from_json(const io::Json& json);

  /// What differs and would change the numbers, options named in `allowed` left out. Options of
  /// ranks, logging, evaluation, saving, time-outs and paths may always differ; so may ranks x
  /// accumulation, as long as a step has as many micro-batches; data and model are compared by
  /// content.
  static std::vector<Difference> compare(const RunIdentity& saved, const RunIdentity& now,
                                         const std::vector<std::string>& allowed);
};

/// Throws ConfigError that lists the differences, if there are any.
void refuse_differences(const std::vector<Difference>& differences, const std::string& checkpoint);

}  // namespace fsdp::trainer
