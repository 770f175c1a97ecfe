#include "libfsdp/lora/fills.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "libfsdp/shard/random.h"

namespace fsdp::lora {

using at::Tensor;

Fill zeros() {
  return [](int64_t, std::span<float> values) { std::fill(values.begin(), values.end(), 0.0F); };
}

Fill values_of(const Tensor& tensor) {
  return [whole = tensor.to(at::kCPU, at::kFloat).contiguous()](int64_t begin,
                                                                std::span<float> values) {
    const float* from = whole.data_ptr<float>() + begin;
    std::copy(from, from + values.size(), values.begin());
  };
}

Fill normal(uint64_t key, double deviation) {
  return [=](int64_t begin, std::span<float> values) {
    fill_normal(key, begin, values, 0, deviation);
  };
}

Fill uniform(uint64_t key, double bound) {
  return [=](int64_t begin, std::span<float> values) {
    fill_uniform(key, begin, values, -bound, bound);
  };
}

void store_fills(ShardedCore& core, const Fills& fills) {
  constexpr int64_t kChunk = int64_t{1} << 20;
  std::vector<float> values;
  for (const OwnedSlice& piece : core.owned_slices()) {
    const auto fill = fills.find(piece.name);
    if (fill == fills.end()) continue;
    for (int64_t at = 0; at < piece.numel; at += kChunk) {
      values.resize(static_cast<size_t>(std::min(kChunk, piece.numel - at)));
      fill->second(piece.param_at + at, values);
      core.store(piece, at, values);
    }
  }
  core.publish();
}

}  // namespace fsdp::lora
