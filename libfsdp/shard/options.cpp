#include "libfsdp/shard/options.h"

#include <charconv>
#include <cstdlib>
#include <cstring>

#include "libfsdp/base/error.h"

namespace fsdp {
namespace {

int number_from(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  if (!text || !*text) return otherwise;
  int value = 0;
  const auto [end, error] = std::from_chars(text, text + std::strlen(text), value);
  if (error != std::errc() || *end || value < 1) {
    throw ConfigError(
        cat("environment variable ", variable, "='", text, "': expected a number from 1"));
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

ShardOptions with_environment(ShardOptions options) {
  options.placement.slots = number_from("FSDP_SLOTS", options.placement.slots);
  options.placement.gradient_slots =
      number_from("FSDP_GRADIENT_SLOTS", options.placement.gradient_slots);
  options.placement.force_slot_home |= equals_or_unset("FSDP_HOME", "slot");
  options.poison |= equals_or_unset("FSDP_POISON", "1");
  return options;
}

}  // namespace fsdp
