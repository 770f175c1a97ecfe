// What adapters and quantised weights have in common: they compute a Linear with a weight that may
// be packed.
#pragma once

#include <memory>
#include <optional>

#include "libfsdp/lora/linear_group.h"
#include "libfsdp/shard/weight_adapter.h"

namespace fsdp::lora {

class LinearBase : public WeightAdapter {
 public:
  /// What is added to the weight's product, if that is one adapter, or none (LowRank{}), as they
  /// are; nothing where it is more: several, dropout, DoRA.
  virtual std::optional<LowRank> plain_adapter() const = 0;

  std::shared_ptr<const PackedWeight> packed;  ///< Null = the weight is a plain matrix.
};

}  // namespace fsdp::lora
