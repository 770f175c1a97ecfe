#include "libfsdp/models/generate.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/random.h"

namespace fsdp::models {
namespace {

struct Candidate {
  int64_t token;
  double probability;
};

/// The most probable tokens first (the lower id among equals), cut at top_k.
std::vector<int64_t> ranked_tokens(const float* logits, int64_t count, int64_t top_k) {
  std::vector<int64_t> tokens(static_cast<size_t>(count));
  std::iota(tokens.begin(), tokens.end(), 0);
  const auto keep = top_k > 0 ? std::min(top_k, count) : count;
  std::partial_sort(tokens.begin(), tokens.begin() + keep, tokens.end(), [&](int64_t a, int64_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  });
  tokens.resize(static_cast<size_t>(keep));
  return tokens;
}

std::vector<Candidate> candidates(const float* logits, int64_t count,
                                  const GenerateOptions& options) {
  const std::vector<int64_t> tokens = ranked_tokens(logits, count, options.top_k);
  const double most = logits[tokens[0]];
  std::vector<Candidate> result;
  double sum = 0;
  for (const int64_t token : tokens) {
    result.push_back(
        {token, std::exp((static_cast<double>(logits[token]) - most) / options.temperature)});
    sum += result.back().probability;
  }
  double reached = 0;
  for (size_t i = 0; i < result.size(); ++i) {
    result[i].probability /= sum;
    reached += result[i].probability;
    if (reached >= options.top_p) {
      result.resize(i + 1);
      break;
    }
  }
  return result;
}

int64_t draw(const std::vector<Candidate>& from, double uniform) {
  double total = 0;
  for (const Candidate& candidate : from) total += candidate.probability;
  double left = uniform * total;
  for (const Candidate& candidate : from) {
    left -= candidate.probability;
    if (left < 0) return candidate.token;
  }
  return from.back().token;
}

int64_t greedy(const float* logits, int64_t count) {
  return std::max_element(logits, logits + count) - logits;
}

at::Tensor as_ids(std::span<const int64_t> tokens) {
  return at::from_blob(const_cast<int64_t*>(tokens.data()), {static_cast<int64_t>(tokens.size())},
                       at::kLong)
      .clone();
}

}  // namespace

void GenerateOptions::validate() const {
  if (max_new_tokens < 0)
    throw ConfigError(cat("max_new_tokens is ", max_new_tokens, ", expected 0 or more"));
  if (!(temperature >= 0))
    throw ConfigError(cat("temperature is ", temperature, ", expected 0 or more"));
  if (top_k < 0) throw ConfigError(cat("top_k is ", top_k, ", expected 0 (all) or more"));
  if (!(top_p > 0 && top_p <= 1))
    throw ConfigError(cat("top_p is ", top_p, ", expected a number in (0, 1]"));
}

int64_t pick_token(const at::Tensor& logits, const GenerateOptions& options, int64_t index) {
  const at::Tensor values = logits.to(at::kCPU, at::kFloat).contiguous();
  const float* data = values.const_data_ptr<float>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    if (std::isnan(data[i]))
      throw NumericsError(cat("generate: the logit of token ", i, " is not a number"));
  }
  if (options.temperature == 0) return greedy(data, values.numel());
  const double uniform = uniform_at(options.seed, static_cast<uint64_t>(index));
  return draw(candidates(data, values.numel(), options), uniform);
}

std::vector<int64_t> generate(const CachedForward& forward, const std::shared_ptr<KvCache>& cache,
                              std::span<const int64_t> prompt, const GenerateOptions& options,
                              const TokenCallback& on_token) {
  options.validate();
  if (prompt.empty()) throw DataError("generate: the prompt has no tokens");
  std::vector<int64_t> tokens;
  at::Tensor ids = as_ids(prompt);
  for (int64_t i = 0; i < options.max_new_tokens; ++i) {
    const int64_t token = pick_token(forward(ids, cache), options, i);
    tokens.push_back(token);
    const bool wanted = !on_token || on_token(token);
    const bool stop = std::find(options.stop_ids.begin(), options.stop_ids.end(), token) !=
                      options.stop_ids.end();
    if (!wanted || stop) break;
    ids = as_ids(std::span(&token, 1));
  }
  return tokens;
}

}  // namespace fsdp::models
