// State of a sharded module, in and out of Hugging Face weight files: every rank reads and writes
// its own bytes.
#pragma once

#include <filesystem>
#include <functional>
#include <span>
#include <string>

#include "libfsdp/base/dtype.h"
#include "libfsdp/io/hf_weights.h"
#include "libfsdp/shard/sharded_core.h"

namespace fsdp {

/// Fills the shards from `weights`. Each rank reads only the byte ranges that it owns; nothing is
/// sent.
///
/// Collective. `tied_aliases`: further names under which the files may hold a tied parameter.
/// `left_out`: parameters that are not in the files and stay as they are (those of adapters); null
/// = none. Memory: two buffers of 8 MiB. Throws ModelError that lists missing, unexpected and
/// misshapen tensors.
void load_weights(ShardedCore& core, const io::HfWeights& weights,
                  std::span<const std::string> tied_aliases = {},
                  const std::function<bool(const std::string& name)>& left_out = {});

/// Writes all parameters into `directory` as the final model.safetensors (or numbered files and
/// their index).
///
/// Collective. No gather: checkpoint::save_model(). Memory: 4 MiB. Throws HostResourceError (full
/// disk) or CommError; then no file has changed.
void save_weights(ShardedCore& core, const std::filesystem::path& directory, DType dtype,
                  int64_t max_file_bytes = io::kDefaultMaxShardBytes);

}  // namespace fsdp
