// What make_optimizer() makes. Not for users of the library.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "libfsdp/optim/optimizer.h"

namespace fsdp::optim {

/// One array of state before it has memory.
struct StateArray {
  std::string_view name;
  DType dtype = DType::kF32;
  int64_t begin = 0;  ///< First element of the shard.
  int64_t count = 0;  ///< Values.
  int64_t elements_per_value = 1;

  int64_t bytes() const;
};

/// All arrays of state of a shard, in order, and their memory. Throws ConfigError on overflow,
/// InternalError when a segment does not fit.
class StatePlan {
 public:
  StatePlan(const OptimizerOptions& options, int64_t numel, std::span<const GroupSegment> segments);

  const std::vector<StateArray>& arrays() const { return arrays_; }
  /// Each array is aligned for any vector: what it takes, and all together.
  static int64_t padded_bytes(const StateArray& array);
  int64_t bytes() const;

 private:
  void add(std::string_view name, DType dtype, int64_t numel) {
    arrays_.push_back({.name = name, .dtype = dtype, .count = numel});
  }
  void add_quantized(const OptimizerOptions& options, const GroupSegment& segment);

  std::vector<StateArray> arrays_;
};

/// As make_optimizer(), for options that were validated.
std::unique_ptr<ShardOptimizer> make_flat_optimizer(const OptimizerOptions& options, int64_t numel,
                                                    std::span<const GroupSegment> segments,
                                                    kernels::Compute& compute);

}  // namespace fsdp::optim
