#include "libfsdp/comm/options.h"

#include <cstdlib>

#include "libfsdp/base/error.h"

namespace fsdp::comm {
namespace {

double seconds_or(const char* name, double otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return otherwise;
  char* end = nullptr;
  const double value = std::strtod(text, &end);
  if (*end != '\0' || !(value > 0)) {
    throw ConfigError(
        cat("[comm] environment variable ", name, "='", text, "': expected seconds above 0"));
  }
  return value;
}

}  // namespace

CommOptions comm_options_from_environment() {
  CommOptions options;
  options.peer_timeout_s = seconds_or("FSDP_PEER_TIMEOUT", options.peer_timeout_s);
  options.timeout_s = seconds_or("FSDP_COMM_TIMEOUT", options.timeout_s);
  options.join_timeout_s = seconds_or("FSDP_JOIN_TIMEOUT", options.join_timeout_s);
  return options;
}

}  // namespace fsdp::comm
