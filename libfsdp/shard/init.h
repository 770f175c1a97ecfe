// First values of parameters, for Sharded::initialize: each element is a function of (seed, name of
// the parameter, index), so that any rank fills its own part and all numbers of ranks and
// strategies start from the same weights.
//
//   sharded.initialize(fsdp::default_initializer(*sharded.module(), seed));
//   sharded.initialize(fsdp::init::normal(seed, 0.02));
#pragma once

#include <torch/nn/module.h>

#include <cstdint>

#include "libfsdp/shard/sharded_core.h"

namespace fsdp {

namespace init {

FillFunction constant(double value);
FillFunction normal(uint64_t seed, double deviation, double mean = 0);
/// In [low, high).
FillFunction uniform(uint64_t seed, double low, double high);
/// Normal numbers that lie in [low, high]; see fill_truncated_normal.
FillFunction truncated_normal(uint64_t seed, double deviation, double mean = 0, double low = -2,
                              double high = 2);
/// Uniform within +-1 / sqrt(fan_in): what torch::nn::Linear and convolutions use for weights
/// (kaiming_uniform with a = sqrt(5)). Throws ConfigError for a parameter of less than 2
/// dimensions, which has no fan_in.
FillFunction kaiming_uniform(uint64_t seed);

}  // namespace init

/// What reset_parameters of LibTorch's own layers in `model` would draw from: Linear, Bilinear,
/// convolutions, embeddings, norms, recurrent layers and cells, PReLU, MultiheadAttention,
/// Transformer and what is made of them. `model` may be on meta.
///
/// `otherwise` fills the parameters of other modules. Throws ConfigError that lists them when there
/// are any and it is null.
FillFunction default_initializer(const torch::nn::Module& model, uint64_t seed,
                                 FillFunction otherwise = nullptr);

}  // namespace fsdp
