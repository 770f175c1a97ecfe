#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"
#include "libfsdp/kernels/quantized_state.h"
#include "libfsdp/optim/flat_optimizers.h"

namespace fsdp::optim {
namespace {

constexpr int64_t kStateAlignment = 64;

}  // namespace

int64_t StateArray::bytes() const {
  return checked_mul<ConfigError>(count, static_cast<int64_t>(dtype_bytes(dtype)),
                                  "optimizer state");
}

StatePlan::StatePlan(const OptimizerOptions& options, int64_t numel,
                     std::span<const GroupSegment> segments) {
  check(numel >= 0, "optimizer: a shard has a negative size");
  switch (options.kind) {
    case OptimizerKind::kAdamW:
      add("exp_avg", DType::kF32, numel);
      add("exp_avg_sq", DType::kF32, numel);
      return;
    case OptimizerKind::kSgd:
      if (options.momentum != 0) add("momentum_buffer", DType::kF32, numel);
      return;
    case OptimizerKind::kAnyPrecisionAdamW:
      add("exp_avg", options.momentum_dtype, numel);
      add("exp_avg_sq", options.variance_dtype, numel);
      if (options.use_kahan_summation)
        add("compensation", options.compensation_buffer_dtype, numel);
      return;
    case OptimizerKind::kAdamW8bit:
      if (segments.empty()) add_quantized(options, {.end = numel});
      for (int64_t last_end = 0; const GroupSegment& segment : segments) {
        check(last_end <= segment.begin && segment.begin <= segment.end && segment.end <= numel,
              "optimizer: segments of 8-bit state overlap, or lie outside of their shard");
        add_quantized(options, segment);
        last_end = segment.end;
      }
      return;
  }
}

void StatePlan::add_quantized(const OptimizerOptions& options, const GroupSegment& segment) {
  const int64_t numel = segment.end - segment.begin;
  check(segment.param_at % kernels::kStateBlock == 0,
        "optimizer: a segment begins inside of a block of 8-bit state");
  if (numel == 0) return;
  const int64_t param_numel = segment.param_numel > 0 ? segment.param_numel : numel;
  const auto add_piece = [&](std::string_view name, DType dtype, int64_t elements_per_value) {
    arrays_.push_back({.name = name,
                       .dtype = dtype,
                       .begin = segment.begin,
                       .count = (numel + elements_per_value - 1) / elements_per_value,
                       .elements_per_value = elements_per_value});
  };
  if (param_numel < options.min_8bit_size) {
    add_piece("state1", DType::kF32, 1);
    add_piece("state2", DType::kF32, 1);
    return;
  }
  add_piece("state1", DType::kU8, 1);
  add_piece("absmax1", DType::kF32, kernels::kStateBlock);
  add_piece("state2", DType::kU8, 1);
  add_piece("absmax2", DType::kF32, kernels::kStateBlock);
}

int64_t StatePlan::padded_bytes(const StateArray& array) {
  return checked_add<ConfigError>(array.bytes(), kStateAlignment - 1, "optimizer") /
         kStateAlignment * kStateAlignment;
}

int64_t StatePlan::bytes() const {
  int64_t total = 0;
  for (const StateArray& array : arrays_)
    total = checked_add<ConfigError>(total, padded_bytes(array), "optimizer");
  return total;
}

}  // namespace fsdp::optim
