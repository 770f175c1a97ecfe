// What adapters and quantised weights have in common: they compute a Linear with a weight that may
// be packed.
#pragma once

#include <memory>

#include "libfsdp/lora/packed_weight.h"
#include "libfsdp/shard/weight_adapter.h"

namespace fsdp::lora {

class LinearBase : public WeightAdapter {
 public:
  std::shared_ptr<const PackedWeight> packed;  ///< Null = the weight is a plain matrix.
};

}  // namespace fsdp::lora
