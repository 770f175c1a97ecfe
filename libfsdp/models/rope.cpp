#include "libfsdp/models/rope.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "libfsdp/base/error.h"

namespace fsdp::models {
namespace {

/// Llama 3: long wavelengths are stretched by `factor`, short ones kept, those between
/// interpolated.
at::Tensor stretch_llama3(const at::Tensor& inverse, const RopeConfig& c) {
  const auto original = static_cast<double>(c.original_max_position_embeddings);
  const at::Tensor wavelength = 2.0 * M_PI / inverse;
  const at::Tensor smooth =
      (original / wavelength - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor);
  const at::Tensor between = (1.0 - smooth) * inverse / c.factor + smooth * inverse;
  const at::Tensor long_ones = wavelength > original / c.low_freq_factor;
  const at::Tensor short_ones = wavelength < original / c.high_freq_factor;
  return at::where(long_ones, inverse / c.factor, at::where(short_ones, inverse, between));
}

}  // namespace

at::Tensor rope_inverse_frequencies(const RopeConfig& config, int64_t head_dim) {
  const at::Tensor exponent =
      at::arange(0, head_dim, 2, at::kLong).to(at::kFloat) / static_cast<double>(head_dim);
  const at::Tensor inverse = at::pow(config.theta, exponent).reciprocal();
  switch (config.type) {
    case RopeConfig::Type::kDefault:
      return inverse;
    case RopeConfig::Type::kLinear:
      return inverse / config.factor;
    case RopeConfig::Type::kLlama3:
      return stretch_llama3(inverse, config);
  }
  throw InternalError("rope: unknown type");
}

void RopeTable::grow(int64_t length) {
  const at::Tensor positions = at::arange(0, length, at::kLong).to(at::kFloat);
  const at::Tensor angles =
      positions.unsqueeze(1) * rope_inverse_frequencies(config_, head_dim_).unsqueeze(0);
  cos_ = at::cos(angles);
  sin_ = at::sin(angles);
}

std::pair<at::Tensor, at::Tensor> RopeTable::lookup(const at::Tensor& position_ids) {
  const at::NoGradGuard no_grad;
  const at::Tensor positions = position_ids.cpu();
  const int64_t most = positions.numel() == 0 ? 0 : positions.max().item<int64_t>();
  if (most < 0) throw DataError(cat("rope: position ", most, " is negative"));
  if (!cos_.defined() || most >= cos_.size(0)) {
    grow(static_cast<int64_t>(
        std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(most + 1, 256)))));
  }
  return {cos_.index_select(0, positions).to(position_ids.device()),
          sin_.index_select(0, positions).to(position_ids.device())};
}

}  // namespace fsdp::models
