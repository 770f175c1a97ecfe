#include "libfsdp/models/kv_cache.h"

#include <ATen/ops/empty.h>

#include "libfsdp/base/error.h"

namespace fsdp::models {

KvCache::KvCache(const LlamaConfig& config, int64_t capacity, const at::TensorOptions& options)
    : capacity_(capacity) {
  const bool wide = options.device().is_cpu() && options.dtype() == at::kBFloat16;
  const at::TensorOptions stored = wide ? options.dtype(at::kFloat) : options;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    keys_.push_back(at::empty({config.num_key_value_heads, capacity, config.head_dim}, stored));
    values_.push_back(at::empty({config.num_key_value_heads, capacity, config.head_dim}, stored));
  }
}

int64_t KvCache::append(int64_t count) {
  if (count > capacity_ - length_) {
    throw ModelError(cat("generate: ", length_, " + ", count, " tokens exceed the cache of ",
                         capacity_, ". Hint: ask for fewer new tokens, or a longer cache"));
  }
  const int64_t begin = length_;
  length_ += count;
  return begin;
}

void KvCache::truncate(int64_t length) {
  check(length >= 0 && length <= length_, "a cache is truncated to a length it has");
  length_ = length;
}

}  // namespace fsdp::models
