// Bytes that one rank will use, by category, before anything is allocated.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "libfsdp/plan/layout.h"
#include "libfsdp/plan/schedule.h"

namespace fsdp::plan {

struct MemoryPlan {
  int64_t parameter_shards = 0;  ///< What gathers read: the parameters' dtype.
  int64_t masters = 0;           ///< What is kept beside 16-bit parameters, see StateBytes.
  int64_t gradient_shards = 0;   ///< fp32 sums; those of the root lie in its slot while steps have
                                 ///< one micro-batch.
  int64_t optimizer_state = 0;
  int64_t gather_slots = 0;    ///< Each as large as its largest unit.
  int64_t gradient_slots = 0;  ///< Likewise.
  int64_t root_slots = 0;      ///< The root's gather slot and gradient slot.
  int64_t stages = 0;          ///< Between the host's memory and the device.
  int64_t outer_slot = 0;      ///< For sums over replicas.
  bool offloads = false;       ///< Shards, masters and optimizer state lie in the host's memory.

  int64_t transient() const {
    return gather_slots + gradient_slots + root_slots + stages + outer_slot;
  }
  /// Shards, masters, sums and optimizer state.
  int64_t state() const;
  /// Where the rank computes.
  int64_t total() const { return transient() + (offloads ? 0 : state()); }
  /// A table for people.
  std::string to_string() const;
};

/// What precision and optimizer keep of a rank's trainable buckets, beside the parameters.
struct StateBytes {
  std::function<int64_t(const Bucket&)> master;  ///< 2 bytes an element for a split bf16 master.
  int64_t optimizer = 0;                         ///< Of all buckets, on the rank that has most.
};

/// What every rank allocates for `layout` under `placement`, to the byte (of optimizer state: the
/// rank that has most); in the shared home what belongs to the rank of the memory that the ranks of
/// its shard group map together.
MemoryPlan plan_memory(const Layout& layout, const Placement& placement, const StateBytes& state);

/// `placement` with as many kept units as fit into `budget_bytes` a rank. Throws DoesNotFitError
/// when not even none of them fit.
Placement fit_to_budget(const Layout& layout, Placement placement, const StateBytes& state,
                        int64_t budget_bytes);

}  // namespace fsdp::plan
