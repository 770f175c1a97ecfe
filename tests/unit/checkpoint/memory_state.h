// Tensors in memory, cut over ranks anywhere: what a sharded model is to the files.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "libfsdp/checkpoint/state_dict.h"

namespace fsdp::checkpoint {

/// Whole tensors; state(rank, world) is what one rank would hold of them.
class MemoryState {
 public:
  struct Tensor {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
    std::vector<std::byte> bytes;
    std::vector<bool> written;  // Element by element, by write().
    int64_t numel() const {
      return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    }
  };

  void add(const std::string& name, DType dtype, std::vector<int64_t> shape) {
    Tensor tensor{name, dtype, std::move(shape), {}, {}};
    tensor.bytes.resize(static_cast<size_t>(tensor.numel()) * dtype_bytes(dtype));
    tensor.written.resize(static_cast<size_t>(tensor.numel()));
    tensors.push_back(std::move(tensor));
  }

  /// Bytes that differ everywhere; floating ones are small finite numbers.
  void fill() {
    uint64_t counter = 1;
    for (Tensor& tensor : tensors) {
      const size_t numel = static_cast<size_t>(tensor.numel());
      std::vector<float> values(numel);
      for (float& value : values) value = static_cast<float>(counter++ * 2654435761U % 4093) / 64;
      if (tensor.dtype <= DType::kBF16) {
        convert_floats(values.data(), DType::kF32, tensor.bytes.data(), tensor.dtype, numel);
      } else {
        for (std::byte& byte : tensor.bytes)
          byte = static_cast<std::byte>(tensor.dtype == DType::kBool ? counter++ % 2
                                                                     : counter++ * 37 % 251);
      }
    }
  }

  /// A state of the same names and shapes without content.
  MemoryState blank() const {
    MemoryState other;
    for (const Tensor& tensor : tensors) other.add(tensor.name, tensor.dtype, tensor.shape);
    return other;
  }

  /// The tensors lie end to end, and rank r of `world` has elements [total r / world, ...).
  StateDict state(int64_t rank, int64_t world) {
    int64_t total = 0, start = 0;
    for (const Tensor& tensor : tensors) total += tensor.numel();
    StateDict state;
    for (Tensor& tensor : tensors) {
      const int64_t begin = std::clamp<int64_t>(total * rank / world - start, 0, tensor.numel());
      const int64_t end =
          std::clamp<int64_t>(total * (rank + 1) / world - start, 0, tensor.numel());
      state.tensors.push_back(part(tensor, begin, end - begin));
      start += tensor.numel();
    }
    return state;
  }

  static TensorPart part(Tensor& tensor, int64_t at, int64_t numel) {
    const auto width = static_cast<int64_t>(dtype_bytes(tensor.dtype));
    TensorPart part{.name = tensor.name,
                    .dtype = tensor.dtype,
                    .shape = tensor.shape,
                    .at = at,
                    .numel = numel};
    part.read = [&tensor, at, width](int64_t offset, std::span<std::byte> to) {
      std::memcpy(to.data(), tensor.bytes.data() + (at + offset) * width, to.size());
    };
    part.write = [&tensor, at, width](int64_t offset, std::span<const std::byte> from) {
      std::memcpy(tensor.bytes.data() + (at + offset) * width, from.data(), from.size());
      for (int64_t i = 0; i < static_cast<int64_t>(from.size()) / width; ++i)
        tensor.written[static_cast<size_t>(at + offset + i)] = true;
    };
    return part;
  }

  std::vector<Tensor> tensors;
};

}  // namespace fsdp::checkpoint
