// Which bytes of which files a rank writes, for each form of a checkpoint.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "libfsdp/checkpoint/range_writer.h"
#include "libfsdp/checkpoint/state_dict.h"
#include "libfsdp/io/hf_weights.h"

namespace fsdp::checkpoint {

/// One rank's part of a save.
struct SavePlan {
  using File = io::HfWritePlan::ShardFile;
  /// Elements [part_at, part_at + numel) of this rank's piece of tensors[tensor] go to `file_at` of
  /// files[file], in the type of files[file].layout.entries[entry].
  struct Piece {
    size_t tensor;
    int64_t part_at;
    int64_t numel;
    size_t file;
    size_t entry;
    int64_t file_at;
  };
  std::vector<File> files;
  std::vector<Piece> pieces;  ///< In the order of the files and of their bytes.
  bool shared = false;        ///< Whether all ranks have the same files, each its own pieces.
  std::string index_name;     ///< With its text: a file that says which file holds which tensor,
  std::string index_json;     ///< written by rank 0; empty when there is none.
};

struct FullForm {
  std::string stem = "model";  ///< "model", "optimizer": the files' name.
  std::optional<DType> dtype;  ///< Type of all floating tensors in the files; empty = their own.
  int64_t max_file_bytes = io::kDefaultMaxShardBytes;
};

/// The files that Hugging Face's tools write, byte for byte what safetensors itself writes. Tensors
/// are split into files in the order of the state. Throws: ConfigError (repeated names).
SavePlan plan_full(const StateDict& state, const FullForm& form = {});

/// The sharded form of torch.distributed.checkpoint: `shard-<rank +
/// 1>-model-<i>-of-<n>.safetensors` with what this rank holds; empty tensors are rank 0's. A piece
/// that is no rectangle goes, as up to 2 * dims - 1 of them, into files 1, 2, ...: a file holds one
/// part of a tensor. A rank that holds nothing has no files. `dtype` as in FullForm. Throws:
/// ConfigError.
SavePlan plan_sharded(const StateDict& state, int64_t rank, std::optional<DType> dtype = {});

/// Makes the files of the plan under `folder` ("" or "optimizer") of the writer's directory and
/// writes this rank's pieces; of shared files rank 0 also writes headers and the index.
///
/// Not collective and without barriers. Memory: 2 MiB, twice where types are converted. Cost: one
/// pass over the rank's bytes. Throws: as RangeWriter; what `read` throws.
void write_state(const SavePlan& plan, const StateDict& state, int64_t rank, RangeWriter& writer,
                 const std::string& folder = "");

}  // namespace fsdp::checkpoint
