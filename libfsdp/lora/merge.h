// A base model and an adapter's files as one model.
#pragma once

#include <string>

#include "libfsdp/checkpoint/state_dict.h"

namespace fsdp::lora {

/// What becomes of weights that the base's files hold in 4 or 8 bits.
enum class MergedForm {
  kAsBase,       ///< Those with an adapter are quantised again, as PEFT does; the others stay.
  kDequantized,  ///< All of them as fp32 elements: for the writer to convert.
};

/// The tensors of the model in `base_directory` with the adapter of a PEFT directory added:
/// W + scaling B A (where the adapter's files hold W too, theirs), DoRA's magnitudes, biases and
/// modules that were trained with it; each in its type in the base.
///
/// Computed while it is read: memory is a few MB and one module's A and B, whatever the model's
/// size; of a quantised base see QuantizedReader, too, and there a merge costs two passes over a
/// weight, three with double quantisation. Used by one thread. Throws: ModelError that names
/// tensors of the adapter that are missing, fit no tensor of the base, misfit in shape or have
/// never been updated; ConfigError for an adapter whose init changed the base (pissa, olora), which
/// the base's files do not show.
checkpoint::StateDict merged_state(const std::string& base_directory,
                                   const std::string& adapter_directory,
                                   MergedForm form = MergedForm::kAsBase);

}  // namespace fsdp::lora
