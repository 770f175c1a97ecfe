// One reader and one writer of model files for sharded ranks: each rank touches only its own byte
// ranges.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
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

/// Writes the weights of a model directory by all ranks at once, without a gather.
///
/// Every rank constructs it from the same arguments. Then: rank 0 create() | barrier | every rank
/// write() for its slices | barrier | rank 0 commit(). Files are written aside and take their names
/// in commit(). The barriers are the caller's.
class HfSave {
 public:
  HfSave(std::string directory, std::span<const io::NamedShape> tensors, DType dtype,
         int64_t max_shard_bytes = io::kDefaultMaxShardBytes);
  HfSave(const HfSave&) = delete;
  HfSave& operator=(const HfSave&) = delete;
  /// abort(), when create() was called here and commit() was not, or when an exception ends the
  /// save: whoever is left removes the files of a rank that died.
  ~HfSave();

  /// Makes the temporary files in their final size, with headers. Leftovers of a killed save are
  /// replaced. Throws: HostResourceError when the disk is too small, ConfigError when the directory
  /// cannot be written.
  void create();

  /// Converts and writes one slice; values.size() == slice.numel. Elements that no rank writes stay
  /// zero: compare the ranks' sum of written_numel() with total_numel(). Throws: HostResourceError;
  /// InternalError for an unknown name or a slice outside its tensor.
  void write(const TensorSlice& slice, std::span<const float> values);

  /// Syncs and renames all files, the index last, then removes weights files of an older save.
  ///
  /// A reader at any instant sees the old model, the new one, or (when files of an older index are
  /// being replaced) no index at all, never a mix.
  void commit();

  /// Removes the temporary files; for any rank, any number of times. Never throws.
  void abort() noexcept;

  int64_t written_numel() const { return written_numel_; }
  int64_t total_numel() const { return total_numel_; }

 private:
  std::string final_path(std::string_view file_name) const;
  std::string temporary_path(size_t file) const;
  const io::File& temporary_file(size_t file);
  void remove_stale_files() const;

  std::string directory_;
  DType dtype_;
  io::HfWritePlan plan_;
  std::map<std::string, io::HfWritePlan::Place, std::less<>> places_;
  std::vector<io::File> files_;  // Opened at the first write.
  std::vector<std::byte> buffer_;
  int64_t written_numel_ = 0;
  int64_t total_numel_ = 0;
  bool owns_temporaries_ = false;
  int exceptions_before_;
};

}  // namespace fsdp::checkpoint
