// Bytes that one rank will use, by category, before anything is allocated.
#pragma once

#include <cstdint>
#include <string>

#include "libfsdp/plan/layout.h"
#include "libfsdp/plan/schedule.h"

namespace fsdp::plan {

struct MemoryPlan {
  int64_t parameter_shards = 0;   ///< What gathers read: the parameters' dtype.
  int64_t master_remainders = 0;  ///< The 16 bits that make a bf16 shard an exact fp32 master.
  int64_t gradient_shards = 0;    ///< fp32 sums.
  int64_t optimizer_state = 0;
  int64_t gather_slots = 0;    ///< slots x largest unit.
  int64_t gradient_slots = 0;  ///< gradient slots x largest unit.
  int64_t root_slots = 0;      ///< The root's gather slot and gradient slot.

  int64_t transient() const { return gather_slots + gradient_slots + root_slots; }
  int64_t total() const;
  /// A table for people.
  std::string to_string() const;
};

/// What `rank` (all are alike) allocates for `layout` under `placement`. `split_master`: trainable
/// bf16 buckets keep a remainder. `optimizer_bytes_per_parameter`: 8 for AdamW in fp32. The
/// gradient slot's dtype is the bucket's.
MemoryPlan plan_memory(const Layout& layout, const Placement& placement, bool split_master,
                       int64_t optimizer_bytes_per_parameter);

}  // namespace fsdp::plan
