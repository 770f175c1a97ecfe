// safetensors files: read any byte range of any tensor, and plan a file so that many ranks can
// write it at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/io/file.h"

namespace fsdp::io {

/// A tensor's place in a file.
struct TensorEntry {
  std::string name;
  std::string dtype_name;      ///< As the file spells it: "F32", "BF16", "F8_E4M3", ...
  std::optional<DType> dtype;  ///< Empty for element types that this library does not compute with.
  std::vector<int64_t> shape;
  int64_t begin = 0;  ///< Offset of the first byte in the file.
  int64_t bytes = 0;
  int64_t numel = 1;
};

/// A tensor that is to be written.
struct TensorSpec {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
};

/// "F32" for kF32, ...
std::string_view safetensors_dtype_name(DType dtype);

/// "[2, 3]", for messages.
std::string shape_text(std::span<const int64_t> shape);

/// An open safetensors file. Move-only; const use from several threads is safe.
class SafetensorsFile {
 public:
  /// Reads and checks the header: its size limit (100 MB), UTF-8, JSON, no repeated or NUL names,
  /// known element types, at most 64 dimensions, sizes that match shapes, data that is contiguous
  /// from the header to the last byte of the file. Throws: ModelError naming the file and the
  /// tensor.
  static SafetensorsFile open(const std::string& path);

  const std::string& path() const { return file_.path(); }

  /// Entries in the order of their data.
  const std::vector<TensorEntry>& entries() const { return entries_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  /// The entry of that name; nullptr when there is none. Cost: logarithmic.
  const TensorEntry* find(std::string_view name) const;

  /// Bytes [byte_offset, byte_offset + out.size()) of a tensor, and nothing else, are read from the
  /// disk. Throws: ModelError when reading fails or a BOOL is neither 0 nor 1; InternalError
  /// outside the tensor.
  void read(const TensorEntry& entry, int64_t byte_offset, std::span<std::byte> out) const;

  /// The open file, for reads that span tensors.
  const File& file() const { return file_; }

 private:
  void parse();

  File file_;
  std::vector<TensorEntry> entries_;
  std::map<std::string, size_t, std::less<>> by_name_;
  std::map<std::string, std::string> metadata_;
};

/// A file that is known to the byte before any tensor exists: all ranks plan the same one and write
/// their ranges.
struct SafetensorsLayout {
  std::string header;  ///< The first bytes of the file: length, JSON, padding to a multiple of 8.
  std::vector<TensorEntry> entries;  ///< In the order of the specs that were given.
  int64_t file_bytes = 0;

  /// Orders the data as the reference writer does (widest type first, then by name), contiguous.
  /// Throws: ConfigError for a repeated name, a negative or overflowing shape.
  static SafetensorsLayout plan(std::span<const TensorSpec> specs,
                                const std::map<std::string, std::string>& metadata = {
                                    {"format", "pt"}});
};

/// Writes a whole file aside and renames it; data[i] are the bytes of specs[i].
/// Throws: InternalError when a size does not match, HostResourceError.
void write_safetensors(const std::string& path, std::span<const TensorSpec> specs,
                       std::span<const std::span<const std::byte>> data,
                       const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

}  // namespace fsdp::io
