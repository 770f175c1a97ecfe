// Reads model files for sharded ranks: each rank only its own byte ranges.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/io/hf_weights.h"

namespace fsdp::checkpoint {

/// A rank's contiguous piece of a flattened parameter, in elements.
struct TensorSlice {
  std::string name;
  int64_t param_at = 0;  ///< First element within the flattened parameter.
  int64_t numel = 0;
  int64_t shard_at =
      0;  ///< Where the piece lies in the rank's shard; carried along, not interpreted.
};

/// Receives a loaded part: values of elements [offset, offset + values.size()) of the slice.
using SliceSink =
    std::function<void(const TensorSlice& slice, int64_t offset, std::span<const float> values)>;

inline constexpr int64_t kDefaultChunkBytes = 8 << 20;

/// Compares a model's tensors with those in its files before anything is read.
///
/// Tensors that the model lacks are an error too, except `*.rotary_emb.inv_freq` of old files and
/// `tied_aliases`: second names of tied parameters (lm_head.weight), which may be there or not.
/// Throws: ModelError that lists missing, unexpected, misshapen and non-floating tensors at once.
void check_names(const io::HfWeights& weights, std::span<const io::NamedShape> expected,
                 std::span<const std::string> tied_aliases = {});

/// Reads exactly the bytes of the slices, converted to float (from F32, F16, BF16, F64), and hands
/// them to `sink`.
///
/// Order: by place in the files, not that of `slices`. A slice may come in several parts; empty
/// slices do not come. Memory: two buffers of at most `chunk_bytes` raw and the same number of
/// elements as float. Cost: one pread for each run of adjacent slices up to chunk_bytes. Throws:
/// ModelError for an unknown tensor, a type that is not floating, or a failed read; InternalError
/// for a slice outside its tensor.
void load_slices(const io::HfWeights& weights, std::span<const TensorSlice> slices,
                 const SliceSink& sink, int64_t chunk_bytes = kDefaultChunkBytes);

}  // namespace fsdp::checkpoint
