// What a directory of safetensors files holds: tensors, each in one piece or in rectangles.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/io/hf_weights.h"

namespace fsdp::checkpoint {

/// A file that was looked into. It is opened again to be read, so that any number of files may be
/// described at once; a file that has changed in between is refused.
class StoredFile {
 public:
  explicit StoredFile(const io::File& file);
  const std::string& path() const { return path_; }
  /// Throws: ModelError when the file is gone or is another one than before.
  io::File open() const;

 private:
  struct Identity {
    uint64_t device = 0, inode = 0;
    int64_t bytes = 0, changed_ns = 0;
    bool operator==(const Identity&) const = default;
  };
  static Identity identity(const io::File& file);
  std::string path_;
  Identity identity_;
};

/// Bytes of one rectangle of a tensor, row-major, from `file_at` of a file.
struct StoredChunk {
  size_t file = 0;  ///< Index into StoredTensors::files().
  int64_t file_at = 0;
  std::vector<int64_t> offsets;
  std::vector<int64_t> sizes;
};

struct StoredTensor {
  std::string name;
  std::string dtype_name;      ///< As the file spells it.
  std::optional<DType> dtype;  ///< Empty for types that this library does not compute with.
  /// Of the whole tensor. Of rectangles that PyTorch wrote, the least shape that holds them all:
  /// its files say no more, so a missing rectangle at the end makes it smaller. Ours say it.
  std::vector<int64_t> shape;
  bool in_rectangles = false;
  bool shape_is_known = true;
  std::vector<StoredChunk> chunks;  ///< Without empty ones.
};

/// A plain value; const use from several threads is safe.
class StoredTensors {
 public:
  /// Opens the sharded form if the directory has files of it (`shard-*-model-*-of-*.safetensors`,
  /// ours or those of torch.distributed.checkpoint), else the full form: `<stem>.safetensors` or
  /// what `<stem>.safetensors.index.json` lists.
  /// Throws: ModelError when there is neither, when a file is not valid, or when the files do not
  /// agree: another type or number of dims for one tensor, rectangles that overlap.
  static StoredTensors open(const std::string& directory, const std::string& stem = "model");
  static StoredTensors of(const io::HfWeights& weights);

  /// For readers of other formats: a file, and a tensor (or a further rectangle of one, and the
  /// whole tensor's shape if it is known) in it. Sizes and offsets come from outside and are
  /// checked. `finish` looks for overlaps, once, at the end. Throws: ModelError.
  StoredTensors(std::string directory) : directory_(std::move(directory)) {}  // NOLINT
  size_t add_file(const io::File& file);
  struct Place {
    std::vector<int64_t> offsets;
    std::optional<std::vector<int64_t>> whole_shape;
  };
  void add(const io::TensorEntry& part, size_t file, std::optional<Place> place = std::nullopt);
  void add_alias(const std::string& alias, const std::string& name) { aliases_[alias] = name; }
  void finish() const;

  const std::string& directory() const { return directory_; }
  const std::vector<StoredFile>& files() const { return files_; }
  const std::map<std::string, StoredTensor, std::less<>>& tensors() const { return tensors_; }

  /// nullptr when there is none. Cost: logarithmic.
  const StoredTensor* find(std::string_view name) const;

  /// Names of tied tensors that were dropped when the files were written -> the name that was kept.
  const std::map<std::string, std::string, std::less<>>& aliases() const { return aliases_; }

 private:
  static StoredTensors open_sharded(const std::string& directory,
                                    const std::vector<std::string>& names);
  void add_safetensors(const io::SafetensorsFile& file, bool sharded);

  std::string directory_;
  std::vector<StoredFile> files_;
  std::map<std::string, StoredTensor, std::less<>> tensors_;
  std::map<std::string, std::string, std::less<>> aliases_;
};

/// The first elements [begin, end) of a tensor of `shape` that no rectangle holds; empty when all
/// are there. Requires: `stored.shape` fits into `shape`.
std::optional<std::pair<int64_t, int64_t>> uncovered_range(const StoredTensor& stored,
                                                           std::span<const int64_t> shape);

/// Is this `shard-?????-model-?????-of-?????.safetensors`?
bool is_shard_file(std::string_view file_name);

}  // namespace fsdp::checkpoint
