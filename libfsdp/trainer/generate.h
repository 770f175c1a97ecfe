// The command `finetune generate`: answers prompts with a trained model.
#pragma once

#include "libfsdp/comm/communicator.h"
#include "libfsdp/trainer/options.h"

namespace fsdp::trainer {

/// Reads and checks the model and the prompts, without loading weights. Throws: ModelError,
/// DataError, ConfigError.
void check_generate(const GenerateOptions& options);

/// The whole command, as one rank: text appears on rank 0 as it is made. Collective.
void run_generate(const GenerateOptions& options, comm::Communicator& comm);

}  // namespace fsdp::trainer
