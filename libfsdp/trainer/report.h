// What a run tells: lines in the form that Hugging Face's Trainer prints, and metrics.jsonl.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "libfsdp/io/file.h"

namespace fsdp::trainer {

/// `value` as Python's repr writes it: the shortest digits that read back, 5e-05, 1.0, 1e+16, nan.
std::string python_repr(double value);

/// Python's round(value, digits).
double python_round(double value, int digits);

/// {'loss': 1.5, 'epoch': 1.0}, as print(dict) writes it.
std::string python_dict(const std::vector<std::pair<std::string, double>>& entries);

/// One optimizer step.
struct StepRecord {
  int64_t step = 0;              ///< Counts from 1.
  double epoch = 0;              ///< Share of the data seen, e.g. 1.25.
  double loss = 0;               ///< Sum of token losses / trainable tokens of the global batch.
  double grad_norm = 0;          ///< Before clipping.
  double learning_rate = 0;      ///< Used in this step.
  int64_t tokens = 0;            ///< All ranks, without padding.
  int64_t trainable_tokens = 0;  ///< All ranks.
  double tokens_per_second = 0;
  double step_seconds = 0;
};

/// One pass over the validation data.
struct EvalRecord {
  int64_t step = 0;
  double epoch = 0;
  double eval_loss = 0;  ///< Sum of token losses / trainable tokens of the whole set.
  double perplexity = 0;
  int64_t eval_tokens = 0;  ///< Trainable tokens.
  int64_t eval_samples = 0;
  double eval_runtime = 0;  ///< Seconds.
};

/// {'loss': ..., 'grad_norm': ..., 'learning_rate': ..., 'epoch': ...}
std::string step_line(double mean_loss, const StepRecord& record);
/// {'eval_loss': ..., 'eval_runtime': ..., 'eval_samples_per_second': ..., 'epoch': ...}; no epoch
/// outside of training.
std::string eval_line(const EvalRecord& record, bool in_training);

/// The last line of a run.
struct RunSummary {
  double train_runtime = 0;  ///< Seconds, with evaluation, as Hugging Face counts it.
  int64_t samples = 0;       ///< Sequences trained on.
  int64_t steps = 0;
  double train_loss = 0;  ///< Mean of the steps' losses.
  double epoch = 0;
};
/// {'train_runtime': ..., 'train_samples_per_second': ..., 'train_steps_per_second': ...,
/// 'train_loss': ..., 'epoch': ...}
std::string summary_line(const RunSummary& summary);

/// metrics.jsonl: one object a line, each written at once, numbers that read back to the same
/// value.
class MetricsFile {
 public:
  /// Starts the file anew. Throws: HostResourceError or ConfigError naming the path.
  explicit MetricsFile(const std::filesystem::path& path);
  /// Goes on with what `from` (this or another run's file; it may be missing) says of steps up to
  /// `step`; what came after that is dropped. Throws likewise.
  MetricsFile(const std::filesystem::path& path, const std::filesystem::path& from, int64_t step);

  /// Throws: HostResourceError when the line cannot be written.
  void write(const StepRecord& record);
  void write(const EvalRecord& record);

 private:
  void write_line(const std::string& line);
  io::File file_;
  int64_t end_ = 0;
};

/// eval_results.json, written aside and renamed; the folder is made.
void write_eval_results(const std::filesystem::path& directory, const EvalRecord& record);

}  // namespace fsdp::trainer
