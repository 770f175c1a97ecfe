// The command `finetune verify`: is every byte of a checkpoint what was written?
#pragma once

#include "libfsdp/base/error.h"
#include "libfsdp/trainer/options.h"

namespace fsdp::trainer {

/// Reads a checkpoint, or every one in a directory, and prints what was found: a line each and the
/// damage by file and tensor; or with `json` one object. Returns the exit code: kModel if one is
/// damaged. Throws: ModelError if there is no checkpoint.
ExitCode run_verify(const VerifyOptions& options);

}  // namespace fsdp::trainer
