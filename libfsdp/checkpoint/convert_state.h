// Writes a whole state, read from anywhere, in either form: what `finetune convert` does.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "libfsdp/base/dtype.h"
#include "libfsdp/checkpoint/state_dict.h"
#include "libfsdp/io/hf_weights.h"

namespace fsdp::checkpoint {

struct ConvertedForm {
  int64_t num_shards = 0;      ///< Files as of that many ranks, cut by rows; 0 = the full form.
  std::optional<DType> dtype;  ///< Of floating tensors; empty = as they are.
  std::string stem = "model";  ///< Name of the full form's files.
  int64_t max_file_bytes = io::kDefaultMaxShardBytes;
};

/// Bytes of the tensors in files, floating ones as `dtype`, if given.
int64_t file_bytes(const StateDict& state, std::optional<DType> dtype = std::nullopt);

/// Writes the tensors' files into `directory`, which exists and has none of them; returns the bytes
/// of tensors. Parts of `state` are whole tensors with `read`.
/// Memory: one buffer of a few MB. Throws: as RangeWriter; what `read` throws.
int64_t write_converted(const StateDict& state, const ConvertedForm& form,
                        const std::string& directory);

}  // namespace fsdp::checkpoint
