// Which rank owns which elements. Numbers only: no memory, no communication.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/plan/mesh.h"

namespace fsdp::plan {

/// Every parameter starts at a multiple of this many elements (512 bytes of bf16), so that a
/// quantum belongs to one parameter and one rank whatever the number of ranks: norms and optimizers
/// with blocks of 256 elements never see a cut one.
inline constexpr int64_t kQuantumNumel = 256;
/// Every rank's part is a multiple of this many elements (512 bytes of bf16).
inline constexpr int64_t kShardQuantumNumel = 256;

struct ParamSpec {
  std::string name;            ///< Fully qualified, as in named_parameters().
  std::vector<int64_t> shape;  ///< 0-D and zero-size are legal.
  DType dtype = DType::kF32;   ///< Of the gathered parameter.
  bool trainable = true;
  int group = 0;  ///< Optimizer group.
  /// Of the gradient as it is collected and sent; sums are fp32. Without: `dtype`.
  std::optional<DType> reduce_dtype = {};

  int64_t numel() const;
};

/// Parameters that are gathered together. Unit 0 of a model is its root: what no other unit holds.
struct UnitSpec {
  std::string name;
  std::vector<ParamSpec> params;
  int parent = 0;  ///< The unit whose module contains this unit's module; 0 = the root.
};

/// A parameter's place in a bucket.
struct Segment {
  int param = 0;      ///< Index into the unit's parameters.
  int64_t begin = 0;  ///< First element in the bucket, a multiple of kQuantumNumel.
  int64_t numel = 0;
};

/// The parameters of one unit with equal dtypes and equal trainability, end to end.
struct Bucket {
  int unit = 0;
  DType dtype = DType::kF32;
  bool trainable = true;
  DType reduce_dtype = DType::kF32;
  std::vector<Segment> segments;
  int64_t numel = 0;  ///< Elements used, gaps between parameters included.
  int64_t shard_numel =
      0;  ///< Elements of each rank's part, padding included; a multiple of kShardQuantumNumel.
  int64_t padded_numel = 0;  ///< shard_numel x shard axis.

  int64_t padded_bytes() const { return padded_numel * static_cast<int64_t>(dtype_bytes(dtype)); }
  int64_t gradient_bytes() const {
    return padded_numel * static_cast<int64_t>(dtype_bytes(reduce_dtype));
  }
  int64_t shard_bytes() const { return shard_numel * static_cast<int64_t>(dtype_bytes(dtype)); }
};

/// A contiguous piece of one parameter that a rank owns.
struct ShardSlice {
  int bucket = 0;
  int segment = 0;
  int64_t param_at = 0;  ///< First element, in the flattened parameter.
  int64_t shard_at = 0;  ///< First element, in the rank's shard of the bucket.
  int64_t numel = 0;
};

/// A model cut into buckets and shards.
struct Layout {
  Mesh mesh;
  std::vector<UnitSpec> units;
  std::vector<Bucket> buckets;            ///< By unit, ascending; trainable before frozen.
  std::vector<std::vector<int>> of_unit;  ///< Bucket indices of each unit.

  const ParamSpec& param(const Bucket& bucket, const Segment& segment) const;
  /// Bytes of all gathered buckets of `unit`.
  int64_t unit_bytes(int unit) const;
  /// Bytes of the gradients of all trainable buckets of `unit`.
  int64_t gradient_bytes(int unit) const;
  /// Whether `ancestor` contains `unit` in the module tree (the root contains all others).
  bool contains(int ancestor, int unit) const;
  /// Units in the longest chain of units that contain each other, the root not counted.
  int nesting_depth() const;
  /// Elements of all trainable buckets of `unit`, padded.
  int64_t trainable_numel(int unit) const;
};

/// Lays `units` out on `mesh`. Throws ConfigError when two parameters have one name, or sizes
/// overflow.
Layout make_layout(std::vector<UnitSpec> units, Mesh mesh);

/// What the rank at `shard_coordinate` owns, in bucket order; pieces of zero-size parameters are
/// left out.
std::vector<ShardSlice> slices_of(const Layout& layout, int shard_coordinate);

}  // namespace fsdp::plan
