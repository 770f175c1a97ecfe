#include "libfsdp/trainer/evaluate.h"

#include <ATen/core/grad_mode.h>

#include <chrono>
#include <cmath>
#include <limits>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/trainer/progress.h"

namespace fsdp::trainer {
namespace {

using Clock = std::chrono::steady_clock;

/// Loss sums of this rank's micro-batches rank, rank + W, ...; ghosts keep ranks with fewer of them
/// in step.
std::optional<std::vector<double>> local_losses(ShardedLm& model, const SequenceData& data,
                                                int64_t turns, const std::function<bool()>& stop) {
  const at::NoGradGuard no_grad;
  const int64_t rank = model.comm().rank();
  const int64_t size = model.comm().size();
  const auto count = data.micro_batches();
  std::vector<double> losses(static_cast<size_t>(turns), 0.0);
  for (int64_t turn = 0; turn < turns; ++turn) {
    if (stop && stop()) return std::nullopt;
    const auto m = turn * size + rank;
    if (m >= count) {
      model.ghost_forward();
      continue;
    }
    const auto batch = data.micro_batch(0, m);
    losses[static_cast<size_t>(turn)] =
        model.run([&](auto& lm) { return lm.loss(batch); }).template item<double>();
  }
  return losses;
}

/// Sum in the order of the micro-batches, which does not depend on the number of ranks.
double summed(comm::Communicator& comm, const std::vector<double>& mine) {
  const auto turns = mine.size();
  const auto size = static_cast<size_t>(comm.size());
  std::vector<double> all(turns * size);
  comm.exchange(mine.data(), turns * sizeof(double), all.data(), comm::make_tag("eval losses"));
  double sum = 0;
  for (size_t turn = 0; turn < turns; ++turn) {
    for (size_t rank = 0; rank < size; ++rank) sum += all[rank * turns + turn];
  }
  return sum;
}

struct EvalInputs {
  ModelFiles files;
  SequenceData data;
};

EvalInputs open_inputs(const EvalOptions& options) {
  auto files = open_model(options.model_name_or_path);
  check_base(files, inference_parts(options.adapter_name_or_path, options.quantization), false);
  files.config.check_context(options.sequence.max_seq_length);
  auto data = SequenceData::open(options.validation_file, files.tokenizer,
                                 {.sequence = options.sequence,
                                  .batch_size = options.per_device_eval_batch_size,
                                  .max_records = options.max_eval_samples});
  return {std::move(files), std::move(data)};
}

}  // namespace

std::optional<EvalRecord> evaluate(ShardedLm& model, const SequenceData& data,
                                   const std::function<bool()>& stop) {
  const auto begin = Clock::now();
  const int64_t size = model.comm().size();
  const auto turns = (data.micro_batches() + size - 1) / size;
  const bool training = model.module()->is_training();
  model.module()->eval();  // Adapters have dropout.
  const auto losses = local_losses(model, data, turns, stop);
  model.module()->train(training);
  if (!losses) return std::nullopt;
  const auto loss_sum = summed(model.comm(), *losses);
  EvalRecord record;
  record.eval_tokens = data.trainable_tokens();
  record.eval_samples = data.samples();
  record.eval_loss = loss_sum / static_cast<double>(record.eval_tokens);
  if (!std::isfinite(record.eval_loss)) {
    throw NumericsError(cat("[eval] the loss is ", record.eval_loss,
                            ". Hint: the weights may hold numbers that are not "
                            "finite, or bf16 overflowed."));
  }
  record.perplexity = std::min(std::exp(record.eval_loss), std::numeric_limits<double>::max());
  record.eval_runtime = std::chrono::duration<double>(Clock::now() - begin).count();
  return record;
}

void check_eval(const EvalOptions& options) { open_inputs(options); }

void run_eval(const EvalOptions& options, comm::Communicator& comm) {
  Console console(comm.rank() != 0);
  const auto inputs = open_inputs(options);
  console.line(cat("data: ", inputs.data.summary()));
  auto model = load_sharded(inputs.files, comm, shard_options(options.ranks), Purpose::kInference,
                            inference_parts(options.adapter_name_or_path, options.quantization));
  const auto record = evaluate(model, inputs.data).value();
  console.line(eval_line(record, false));
  console.line(cat("eval_loss ", python_repr(record.eval_loss), "  perplexity ",
                   python_repr(record.perplexity), "  eval_tokens ", record.eval_tokens,
                   "  eval_samples ", record.eval_samples));
  if (comm.rank() == 0 && !options.output_dir.empty())
    write_eval_results(options.output_dir, record);
}

}  // namespace fsdp::trainer
