// Files of torch.save and of torch.distributed.checkpoint's own format, as tensors in files.
//
// Both are pickles. They are read by a reader that calls nothing (io/pickle.h) in a child process
// with limits (isolated.h), which hands back a plain description: name, type, shape, file, offset.
// That is checked again against the files; the bytes of tensors are then read in place.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "libfsdp/checkpoint/stored_tensors.h"

namespace fsdp::checkpoint {

/// A tensor, or a rectangle of one, in a file.
struct FoundTensor {
  std::string name;
  std::string dtype_name;  ///< As safetensors spells it: "BF16".
  std::vector<int64_t> shape;
  std::vector<int64_t> offsets;      ///< Of the rectangle.
  std::vector<int64_t> whole_shape;  ///< Of the tensor.
  size_t file = 0;
  int64_t at = 0;  ///< First byte in the file.
};

struct FoundTensors {
  std::vector<std::string> files;  ///< Paths.
  std::vector<FoundTensor> tensors;
  std::vector<std::string> skipped;  ///< Names of values that are no tensors.
};

/// Tensors of a file that torch.save wrote (.pth, .pt, .bin): a dict of them, or a dict of dicts,
/// whose names are then joined by dots. Only the zip format (since PyTorch 1.6), uncompressed,
/// contiguous tensors. Memory and time are limited. Throws: ModelError naming the file, and the
/// tensor or the global that is refused.
FoundTensors find_in_pth(const std::string& path);

/// Tensors of a directory with `.metadata` and `.distcp` files. Throws: ModelError.
FoundTensors find_in_dcp(const std::string& directory);

/// As stored tensors, checked against the files: sizes, places, overlaps, whole coverage.
/// Throws: ModelError.
StoredTensors as_stored(const FoundTensors& found, const std::string& directory);

}  // namespace fsdp::checkpoint
