// Reads stored tensors piece by piece, in their own type: the source of a conversion.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "libfsdp/checkpoint/state_dict.h"
#include "libfsdp/checkpoint/stored_tensors.h"

namespace fsdp::checkpoint {

/// Keeps a few files open and one buffer of the size of the largest request that meets a tensor in
/// rectangles.
class StoredReader {
 public:
  explicit StoredReader(StoredTensors stored) : stored_(std::move(stored)) {}
  StoredReader(const StoredReader&) = delete;
  StoredReader& operator=(const StoredReader&) = delete;

  const StoredTensors& stored() const { return stored_; }

  /// Elements from `at` of the flattened tensor, as many as fill `out`. All must be stored.
  /// Throws: ModelError; InternalError for a type that this library does not compute with.
  void read(const StoredTensor& tensor, int64_t at, std::span<std::byte> out);

 private:
  const io::File& file(size_t index);

  StoredTensors stored_;
  std::list<std::pair<size_t, io::File>> open_;  // The latest used first.
  std::vector<std::byte> buffer_;
};

/// All stored tensors as a state of one rank, which reads through `reader`. Names in `order` come
/// first, the rest sorted by name. Throws: ModelError for types that this library does not compute
/// with, and where elements of a tensor are missing.
StateDict stored_state(const std::shared_ptr<StoredReader>& reader,
                       std::span<const std::string> order = {});

}  // namespace fsdp::checkpoint
