#include "libfsdp/optim/optimizer.h"

#include <cmath>

#include "libfsdp/base/error.h"
#include "libfsdp/optim/flat_optimizers.h"

namespace fsdp::optim {
namespace {

void require(bool condition, std::string_view field, double value, std::string_view expected) {
  if (!condition)
    throw ConfigError(cat("optimizer: ", field, " is ", value, "; expected ", expected));
}

void require_f32_or_bf16(DType dtype, std::string_view field) {
  if (dtype != DType::kF32 && dtype != DType::kBF16) {
    throw ConfigError(
        cat("optimizer: ", field, " is ", dtype_name(dtype), "; expected float32 or bfloat16"));
  }
}

}  // namespace

OptimizerKind optimizer_kind_from_name(std::string_view name) {
  if (name == "adamw" || name == "adamw_torch" || name == "adamw_torch_fused")
    return OptimizerKind::kAdamW;
  if (name == "sgd") return OptimizerKind::kSgd;
  if (name == "adamw_anyprecision" || name == "anyprecision")
    return OptimizerKind::kAnyPrecisionAdamW;
  if (name == "adamw_8bit" || name == "adamw_bnb_8bit") return OptimizerKind::kAdamW8bit;
  throw ConfigError(cat("unknown optimizer '", name,
                        "'. Known: adamw (adamw_torch, adamw_torch_fused), sgd, adamw_anyprecision "
                        "(anyprecision), adamw_8bit (adamw_bnb_8bit)"));
}

void OptimizerOptions::validate() const {
  require(beta1 >= 0 && beta1 < 1, "beta1", beta1, "0 <= beta1 < 1");
  require(beta2 >= 0 && beta2 < 1, "beta2", beta2, "0 <= beta2 < 1");
  require(epsilon >= 0 && std::isfinite(epsilon), "epsilon", epsilon, "a finite number >= 0");
  require(momentum >= 0 && std::isfinite(momentum), "momentum", momentum, "a finite number >= 0");
  require(min_8bit_size >= 0, "min_8bit_size", static_cast<double>(min_8bit_size), ">= 0");
  if (nesterov && momentum == 0) throw ConfigError("optimizer: nesterov needs a momentum above 0");
  require_f32_or_bf16(momentum_dtype, "momentum_dtype");
  require_f32_or_bf16(variance_dtype, "variance_dtype");
  require_f32_or_bf16(compensation_buffer_dtype, "compensation_buffer_dtype");
  if (use_kahan_summation && kind != OptimizerKind::kAnyPrecisionAdamW)
    throw ConfigError("optimizer: use_kahan_summation needs adamw_anyprecision");
  if (use_kahan_summation && stochastic_rounding) {
    throw ConfigError(
        "optimizer: use_kahan_summation keeps what rounding loses, stochastic_rounding rounds it "
        "at random. Hint: choose one.");
  }
}

int64_t state_bytes(const OptimizerOptions& options, int64_t numel,
                    std::span<const GroupSegment> segments) {
  return StatePlan(options, numel, segments).bytes();
}

std::unique_ptr<ShardOptimizer> make_optimizer(const OptimizerOptions& options, int64_t numel,
                                               std::span<const GroupSegment> segments,
                                               kernels::Compute& compute) {
  options.validate();
  return make_flat_optimizer(options, numel, segments, compute);
}

}  // namespace fsdp::optim
