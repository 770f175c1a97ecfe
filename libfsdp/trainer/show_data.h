// The command `finetune show-data`: what the model will see, and what it will be trained on.
#pragma once

#include "libfsdp/trainer/options.h"

namespace fsdp::trainer {

/// Prints the first sequences of a file as text, what is trained on in colour on a terminal and in
/// [[...]] elsewhere; or with `json` every sequence as one JSON object. Needs the tokenizer only,
/// not the weights. Throws: DataError, ModelError.
void run_show_data(const ShowDataOptions& options);

}  // namespace fsdp::trainer
