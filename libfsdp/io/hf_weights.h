// The weights of a Hugging Face model directory: one safetensors file, or several with an index.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/io/safetensors.h"

namespace fsdp::io {

inline constexpr int64_t kDefaultMaxShardBytes = 5'000'000'000;

/// A tensor that a model has.
struct NamedShape {
  std::string name;
  std::vector<int64_t> shape;
};

/// All tensors of a model directory. Move-only; const use from several threads is safe.
class HfWeights {
 public:
  struct Location {
    const SafetensorsFile* file;
    const TensorEntry* entry;
  };

  /// Opens <stem>.safetensors, else the files of <stem>.safetensors.index.json.
  /// Throws: ModelError when there is neither (with a hint when there are pickle files, which are
  /// never read), when a listed file is missing or its name is not a plain file name of this
  /// directory, when a tensor is in two files, or not in the file that the index says.
  static HfWeights open(const std::string& directory, const std::string& stem = "model");

  const std::string& directory() const { return directory_; }
  const std::vector<SafetensorsFile>& files() const { return files_; }

  /// Where the tensor lies; empty when there is none. Cost: logarithmic.
  std::optional<Location> find(std::string_view name) const;

  /// All names, sorted.
  std::vector<std::string> names() const;

 private:
  std::string directory_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::pair<size_t, size_t>, std::less<>> by_name_;  // name -> (file, entry)
};

/// The files of a model that is to be written.
struct HfWritePlan {
  struct ShardFile {
    std::string name;
    SafetensorsLayout layout;
  };
  /// Where tensor i of the given list goes: files[file].layout.entries[entry].
  struct Place {
    size_t file;
    size_t entry;
  };
  std::vector<ShardFile> files;
  std::vector<Place> places;
  std::string
      index_json;  ///< Contents of <stem>.safetensors.index.json; empty when one file holds all.
  int64_t total_bytes = 0;
};

/// Splits the tensors, in the given order, as huggingface_hub does: a new file when the next tensor
/// would exceed `max_shard_bytes`, a file of its own for a tensor that alone exceeds it. Throws:
/// ConfigError for repeated names, overflowing shapes, or max_shard_bytes < 1.
HfWritePlan plan_hf_files(std::span<const TensorSpec> specs,
                          int64_t max_shard_bytes = kDefaultMaxShardBytes,
                          const std::string& stem = "model");

/// "5GB" -> 5'000'000'000; units B, KB, MB, GB, TB, decimal, any case. Throws: ConfigError.
int64_t parse_bytes(std::string_view text);

/// Is this `model.safetensors`, `model-0000i-of-0000n.safetensors` or the index (or those of
/// another stem): a file that a save replaces?
bool is_hf_weights_file(std::string_view file_name, std::string_view stem = "model");

}  // namespace fsdp::io
