// First values of parameters, however they are divided over ranks.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>

#include "libfsdp/shard/sharded_core.h"

namespace fsdp::lora {

/// Writes the elements [begin, ...) of a flattened parameter.
using Fill = std::function<void(int64_t begin, std::span<float> values)>;
using Fills = std::map<std::string, Fill>;  ///< By full name of the parameter.

Fill zeros();
Fill values_of(const at::Tensor& tensor);
Fill normal(uint64_t key, double deviation);
Fill uniform(uint64_t key, double bound);  ///< Within +-bound.

/// Fills this rank's parts of these parameters. Collective.
void store_fills(ShardedCore& core, const Fills& fills);

}  // namespace fsdp::lora
