#include "libfsdp/models/init.h"

#include <algorithm>
#include <cmath>

#include "libfsdp/models/random.h"

namespace fsdp::models {
namespace {

/// Box-Muller: elements 2 i and 2 i + 1 share the uniforms 2 i and 2 i + 1.
double normal_at(uint64_t key, uint64_t element) {
  const uint64_t pair = element & ~uint64_t{1};
  const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform_at(key, pair)));
  const double angle = 2.0 * M_PI * uniform_at(key, pair + 1);
  return radius * ((element & 1) == 0 ? std::cos(angle) : std::sin(angle));
}

bool is_norm(std::string_view name) {
  return name.ends_with("norm.weight") || name.ends_with("layernorm.weight");
}

}  // namespace

void random_init(std::string_view name, int64_t begin, std::span<float> out, uint64_t seed,
                 double std_dev) {
  if (is_norm(name) || name.ends_with(".bias")) {
    std::fill(out.begin(), out.end(), is_norm(name) ? 1.0F : 0.0F);
    return;
  }
  const uint64_t key = stream_key(seed, name);
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<float>(std_dev * normal_at(key, static_cast<uint64_t>(begin) + i));
  }
}

}  // namespace fsdp::models
