// The command `finetune train`: from a model's folder and a data file to a trained model's folder.
#pragma once

#include "libfsdp/comm/communicator.h"
#include "libfsdp/trainer/options.h"

namespace fsdp::trainer {

/// How many optimizer steps a run has, and which micro-batches belong to each. Note [Micro-batch
/// order]: in a step that begins at global micro-batch f, rank r's accumulation step a takes
/// micro-batch f + a * ranks + r, as far as the step goes: ranks may have unequal numbers of them.
/// A step never crosses the end of an epoch: the last one of an epoch may have fewer micro-batches.
struct StepPlan {
  int64_t micro_batches_per_epoch = 0;
  int64_t ranks = 1;
  int64_t micro_batches_a_step = 1;  ///< Over all ranks.
  int64_t total_steps = 0;
  /// Ranks in whose micro-batches epochs are counted: those of the run's first session.
  int64_t counted_ranks = 1;

  /// `micro_batches_a_step`: those of the run that is resumed; 0 = ranks x accumulation, as the
  /// options say. Throws ConfigError when the options give no step.
  static StepPlan make(const TrainOptions& options, int64_t micro_batches_per_epoch, int64_t ranks,
                       int64_t micro_batches_a_step = 0);

  int64_t steps_per_epoch() const;
  /// Where 0-based `step` lies.
  struct Place {
    int64_t epoch = 0;
    int64_t first = 0;       ///< First micro-batch in the epoch's order.
    int64_t end = 0;         ///< One past the last.
    double epoch_after = 0;  ///< Epochs seen after the step, as Hugging Face counts them.
  };
  Place place(int64_t step) const;
};

/// Reads and checks the model, the data and the output folder, without loading weights: what is
/// wrong is told here. Throws: ModelError, DataError, ConfigError, HostResourceError.
void check_train(const TrainOptions& options);

/// The whole run, as one rank. Collective. `resolved_options` (JSON) is stored beside the model.
///
/// Returns 0, or ExitCode::kStoppedWithCheckpoint when a signal asked it to end. Checkpoints go to
/// output_dir as the options say; with resume_from_checkpoint it goes on where one was made, with
/// the bits of a run that was not interrupted (in deterministic mode at any number of ranks).
/// Throws: NumericsError naming the step when the loss or a gradient is not finite (no model is
/// saved then, checkpoints stay); ConfigError for options that differ from those of the run that is
/// resumed; ModelError for a damaged checkpoint.
int run_train(const TrainOptions& options, const std::string& resolved_options,
              comm::Communicator& comm);

}  // namespace fsdp::trainer
