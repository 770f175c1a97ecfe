// Evaluation: sum of token losses / trainable tokens over a whole set.
#pragma once

#include <functional>
#include <optional>

#include "libfsdp/trainer/data.h"
#include "libfsdp/trainer/options.h"
#include "libfsdp/trainer/report.h"
#include "libfsdp/trainer/session.h"

namespace fsdp::trainer {

/// Evaluates `data`; ranks take the micro-batches in turn. Collective; equal result on all ranks
/// and at any number of ranks (losses are summed in the order of the micro-batches). Step and epoch
/// of the record are left at 0. `stop` is asked before each micro-batch and must answer alike on
/// all ranks; nothing is returned when it says so. Throws: NumericsError when the loss is not
/// finite.
std::optional<EvalRecord> evaluate(ShardedLm& model, const SequenceData& data,
                                   const std::function<bool()>& stop = {});

/// Reads and checks the model and the data, without loading weights. Throws: ModelError, DataError,
/// ConfigError.
void check_eval(const EvalOptions& options);

/// The command `finetune eval`, as one rank. Collective.
void run_eval(const EvalOptions& options, comm::Communicator& comm);

}  // namespace fsdp::trainer
