#include "libfsdp/shard/options.h"

#include <charconv>
#include <cstdlib>
#include <cstring>

#include "libfsdp/base/error.h"

namespace fsdp {
namespace {

int number_from(const char* variable, int otherwise, int least = 1) {
  const char* text = std::getenv(variable);
  if (!text || !*text) return otherwise;
  int value = 0;
  const auto [end, error] = std::from_chars(text, text + std::strlen(text), value);
  if (error != std::errc() || *end || value < least) {
    throw ConfigError(
        cat("environment variable ", variable, "='", text, "': expected a number from ", least));
  }
  return value;
}

bool equals_or_unset(const char* variable, const char* expected) {
  const char* text = std::getenv(variable);
  if (!text || !*text || std::strcmp(text, "0") == 0) return false;
  if (std::strcmp(text, expected) == 0) return true;
  throw ConfigError(cat("environment variable ", variable, "='", text, "': expected '", expected,
                        "' or nothing"));
}

}  // namespace

void ShardOptions::validate() const {
  using engine::MasterPrecision;
  const auto refuse = [](const std::string& text) { throw ConfigError(text); };
  const auto known = [](const std::optional<DType>& dtype) {
    return !dtype || *dtype == DType::kF32 || *dtype == DType::kBF16 || *dtype == DType::kF16;
  };
  if (!known(param_dtype)) {
    refuse(
        cat("param_dtype ", dtype_name(*param_dtype), ": expected float32, bfloat16 or float16"));
  }
  if (!known(reduce_dtype)) {
    refuse(
        cat("reduce_dtype ", dtype_name(*reduce_dtype), ": expected float32, bfloat16 or float16"));
  }
  if (master == MasterPrecision::kNone && param_dtype == DType::kF16)
    refuse("float16 parameters without a master: expected bfloat16, or master kF32");
  if (deterministic && placement.accumulation == plan::Accumulation::kUnsharded) {
    refuse(
        "deterministic with unsharded accumulation: the order of its sums depends on the number "
        "of ranks. Hint: sharded accumulation, which also needs less memory.");
  }
  if (groups.empty()) refuse("no parameter group: expected at least one");
  optimizer.validate();
  if (loss_scaler) loss_scaler->validate();
}

ShardOptions with_environment(ShardOptions options) {
  options.placement.slots = number_from("FSDP_SLOTS", options.placement.slots);
  options.placement.gradient_slots =
      number_from("FSDP_GRADIENT_SLOTS", options.placement.gradient_slots);
  options.placement.kept_units = number_from("FSDP_KEPT_UNITS", options.placement.kept_units, 0);
  options.verify_plans |= equals_or_unset("FSDP_CHECK_PLANS", "1");
  options.placement.force_slot_home |= equals_or_unset("FSDP_HOME", "slot");
  options.poison |= equals_or_unset("FSDP_POISON", "1");
  return options;
}

}  // namespace fsdp
