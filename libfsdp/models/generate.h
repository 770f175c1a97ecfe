// Text generation, token by token.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "libfsdp/models/kv_cache.h"

namespace fsdp::models {

struct GenerateOptions {
  int64_t max_new_tokens = 256;
  double temperature = 0;  ///< 0: greedy.
  int64_t top_k = 0;       ///< 0: all.
  double top_p = 1;        ///< Smallest set of tokens whose probabilities reach it.
  uint64_t seed = 0;
  std::vector<int64_t> stop_ids;

  /// Throws ConfigError when a number is out of range.
  void validate() const;
};

/// Appends tokens to the cache and gives fp32 logits [V] of the last one; for a sharded model
/// `[&](auto& ids, auto& cache) { return sharded.run([&](auto& m) { return m.forward_cached(ids,
/// cache); }); }`.
using CachedForward =
    std::function<at::Tensor(const at::Tensor& ids, const std::shared_ptr<KvCache>& cache)>;

/// Called with each new token (stop tokens too); returns false to stop.
using TokenCallback = std::function<bool(int64_t token)>;

/// Picks the next token from fp32 logits [V]: a pure function of the arguments, `index` counts the
/// picks of a run.
int64_t pick_token(const at::Tensor& logits, const GenerateOptions& options, int64_t index);

/// Continues `prompt`; returns the new tokens, the stop token last if one ended it.
///
/// Collective: if `forward` is; all ranks then pick the same tokens.
/// Throws:     DataError for an empty prompt; ModelError when prompt and new tokens exceed the
/// cache.
std::vector<int64_t> generate(const CachedForward& forward, const std::shared_ptr<KvCache>& cache,
                              std::span<const int64_t> prompt, const GenerateOptions& options,
                              const TokenCallback& on_token = {});

}  // namespace fsdp::models
