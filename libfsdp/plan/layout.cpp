#include "libfsdp/plan/layout.h"

#include <algorithm>
#include <set>

#include "libfsdp/base/checked.h"

namespace fsdp::plan {
namespace {

// Index of the unit's bucket with this key, made when it does not exist yet.
int bucket_for(Layout& layout, int unit, const ParamSpec& param) {
  const DType reduce_dtype = param.reduce_dtype.value_or(param.dtype);
  for (const int index : layout.of_unit[static_cast<size_t>(unit)]) {
    const Bucket& bucket = layout.buckets[static_cast<size_t>(index)];
    if (bucket.dtype == param.dtype && bucket.trainable == param.trainable &&
        bucket.reduce_dtype == reduce_dtype)
      return index;
  }
  layout.buckets.push_back({.unit = unit,
                            .dtype = param.dtype,
                            .trainable = param.trainable,
                            .reduce_dtype = reduce_dtype,
                            .segments = {}});
  layout.of_unit[static_cast<size_t>(unit)].push_back(static_cast<int>(layout.buckets.size()) - 1);
  return static_cast<int>(layout.buckets.size()) - 1;
}

void append(Bucket& bucket, int index, const ParamSpec& param) {
  const int64_t begin = round_up(bucket.numel, kQuantumNumel);
  bucket.segments.push_back({.param = index, .begin = begin, .numel = param.numel()});
  bucket.numel = checked_add<ConfigError>(begin, param.numel(), param.name);
  checked_add<ConfigError>(bucket.numel, kQuantumNumel, param.name);  // Room to round up.
}

void close(Bucket& bucket, int shard) {
  const int64_t part = bucket.numel / shard + (bucket.numel % shard != 0 ? 1 : 0);
  checked_add<ConfigError>(part, kShardQuantumNumel, "size of a bucket");
  bucket.shard_numel = round_up(part, kShardQuantumNumel);
  bucket.padded_numel = checked_mul<ConfigError>(bucket.shard_numel, shard, "size of a bucket");
}

void refuse_equal_names(const std::vector<UnitSpec>& units) {
  std::set<std::string> seen;
  for (const UnitSpec& unit : units) {
    for (const ParamSpec& param : unit.params) {
      if (!seen.insert(param.name).second) {
        throw ConfigError(cat("parameter '", param.name, "' appears twice in the model's units"));
      }
    }
  }
}

}  // namespace

int64_t ParamSpec::numel() const {
  int64_t product = 1;
  for (const int64_t dim : shape) product = checked_mul<ConfigError>(product, dim, name);
  return product;
}

const ParamSpec& Layout::param(const Bucket& bucket, const Segment& segment) const {
  return units[static_cast<size_t>(bucket.unit)].params[static_cast<size_t>(segment.param)];
}

int64_t Layout::unit_bytes(int unit) const {
  int64_t bytes = 0;
  for (const int b : of_unit[static_cast<size_t>(unit)])
    bytes += buckets[static_cast<size_t>(b)].padded_bytes();
  return bytes;
}

int64_t Layout::gradient_bytes(int unit) const {
  int64_t bytes = 0;
  for (const int b : of_unit[static_cast<size_t>(unit)]) {
    const Bucket& bucket = buckets[static_cast<size_t>(b)];
    if (bucket.trainable) bytes += bucket.gradient_bytes();
  }
  return bytes;
}

bool Layout::contains(int ancestor, int unit) const {
  while (unit != 0 && unit != ancestor) unit = units[static_cast<size_t>(unit)].parent;
  return unit == ancestor;
}

int Layout::nesting_depth() const {
  int deepest = 0;
  for (size_t unit = 1; unit < units.size(); ++unit) {
    int depth = 0;
    for (int at = static_cast<int>(unit); at != 0; at = units[static_cast<size_t>(at)].parent)
      ++depth;
    deepest = std::max(deepest, depth);
  }
  return deepest;
}

int64_t Layout::trainable_numel(int unit) const {
  int64_t numel = 0;
  for (const int b : of_unit[static_cast<size_t>(unit)]) {
    const Bucket& bucket = buckets[static_cast<size_t>(b)];
    if (bucket.trainable) numel += bucket.padded_numel;
  }
  return numel;
}

Layout make_layout(std::vector<UnitSpec> units, Mesh mesh) {
  refuse_equal_names(units);
  for (size_t unit = 0; unit < units.size(); ++unit) {
    if (units[unit].parent < 0 || (unit > 0 && units[unit].parent >= static_cast<int>(unit))) {
      throw ConfigError(cat("unit '", units[unit].name, "' names ", units[unit].parent,
                            " as the unit around it; expected an earlier one"));
    }
  }
  Layout layout;
  layout.mesh = mesh;
  layout.of_unit.resize(units.size());
  for (size_t u = 0; u < units.size(); ++u) {
    // Trainable first, so that a unit's gradients lie end to end.
    for (const bool trainable : {true, false}) {
      for (size_t p = 0; p < units[u].params.size(); ++p) {
        const ParamSpec& param = units[u].params[p];
        if (param.trainable != trainable) continue;
        const int bucket = bucket_for(layout, static_cast<int>(u), param);
        append(layout.buckets[static_cast<size_t>(bucket)], static_cast<int>(p), param);
      }
    }
  }
  for (Bucket& bucket : layout.buckets) close(bucket, mesh.shard);
  layout.units = std::move(units);
  return layout;
}

std::vector<ShardSlice> slices_of(const Layout& layout, int shard_coordinate) {
  std::vector<ShardSlice> slices;
  for (size_t b = 0; b < layout.buckets.size(); ++b) {
    const Bucket& bucket = layout.buckets[b];
    const int64_t shard_begin = shard_coordinate * bucket.shard_numel;
    const int64_t shard_end = shard_begin + bucket.shard_numel;
    for (size_t s = 0; s < bucket.segments.size(); ++s) {
      const Segment& segment = bucket.segments[s];
      const int64_t begin = std::max(segment.begin, shard_begin);
      const int64_t end = std::min(segment.begin + segment.numel, shard_end);
      if (begin >= end) continue;
      slices.push_back({.bucket = static_cast<int>(b),
                        .segment = static_cast<int>(s),
                        .param_at = begin - segment.begin,
                        .shard_at = begin - shard_begin,
                        .numel = end - begin});
    }
  }
  return slices;
}

}  // namespace fsdp::plan
