#include "libfsdp/models/init.h"

#include <algorithm>

#include "libfsdp/shard/random.h"

namespace fsdp::models {
namespace {

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
  fill_normal(stream_key(seed, name), begin, out, 0, std_dev);
}

}  // namespace fsdp::models
