#include "libfsdp/comm/launch/meeting_point.h"

#include <algorithm>
#include <charconv>
#include <tuple>
#include <utility>

#include "libfsdp/base/error.h"

namespace fsdp::comm {
namespace {

constexpr size_t kTokenBytes = 120;

int port_of(const Environment& environment, const char* name, int further = 0) {
  const std::string text = environment(name);
  int port = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), port);
  if (error != std::errc() || end != text.data() + text.size() || port < 1 ||
      port + further > 65535) {
    throw ConfigError(cat("[comm] environment variable ", name, "='", text, "': expected a port"));
  }
  return port + further;
}

std::string host_of(const Environment& environment) {
  if (const std::string host = environment("MASTER_ADDR"); !host.empty()) return host;
  for (const char* name : {"SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"}) {
    if (const std::string list = environment(name); !list.empty()) return first_slurm_host(list);
  }
  throw ConfigError(
      "[comm] the ranks are on several hosts and MASTER_ADDR is not set. Hint: set it to an "
      "address "
      "of rank 0's host, on all ranks (mpirun: -x MASTER_ADDR=...).");
}

int port_of(const Environment& environment) {
  if (!environment("FSDP_RENDEZVOUS_PORT").empty())
    return port_of(environment, "FSDP_RENDEZVOUS_PORT");
  if (!environment("MASTER_PORT").empty()) {
    const bool taken = environment("TORCHELASTIC_USE_AGENT_STORE") == "True";
    return port_of(environment, "MASTER_PORT", taken ? 1 : 0);
  }
  const std::string job = environment("SLURM_JOB_ID");
  if (job.empty()) return 29500;
  int digits = 0;
  for (const char c : job.substr(job.size() - std::min<size_t>(job.size(), 4)))
    digits = 10 * digits + (c >= '0' && c <= '9' ? c - '0' : 0);
  return 15000 + digits;
}

/// Name of the variable that gives the token, and the token.
std::pair<std::string, std::string> token_of(const Environment& environment) {
  if (const std::string token = environment("FSDP_RENDEZVOUS_TOKEN"); !token.empty()) {
    if (token.size() > kTokenBytes)
      throw ConfigError(cat("[comm] FSDP_RENDEZVOUS_TOKEN has ", token.size(),
                            " characters; at most ", kTokenBytes));
    return {"FSDP_RENDEZVOUS_TOKEN", token};
  }
  for (const char* name : {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "PMIX_NAMESPACE"}) {
    std::string token = environment(name);
    if (token.empty()) continue;
    // A process that is left over from before a restart is of another world.
    for (const char* further : {"TORCHELASTIC_RESTART_COUNT", "SLURM_STEP_ID"}) {
      if (const std::string value = environment(further); !value.empty()) token += cat("/", value);
    }
    return {name, token.substr(token.size() - std::min(token.size(), kTokenBytes))};
  }
  throw ConfigError(
      "[comm] the ranks are on several hosts and nothing tells them from strangers. Hint: set "
      "FSDP_RENDEZVOUS_TOKEN to the same secret on all of them.");
}

}  // namespace

MeetingPoint meeting_point_of(const Environment& environment) {
  MeetingPoint point;
  point.host = host_of(environment);
  point.port = port_of(environment);
  std::tie(point.token_from, point.token) = token_of(environment);
  return point;
}

std::string first_slurm_host(const std::string& list) {
  const size_t end = list.find_first_of(",[");
  std::string host = list.substr(0, end);
  if (end == std::string::npos || list[end] == ',') return host;
  const size_t numbers_end = list.find_first_of(",-]", end + 1);
  if (numbers_end == std::string::npos)
    throw ConfigError(cat("[comm] cannot read the first host of the list '", list, "'"));
  host += list.substr(end + 1, numbers_end - end - 1);
  const size_t close = list.find(']', end);
  const size_t rest_end = list.find_first_of(",[", close);
  if (close != std::string::npos && close + 1 < list.size())
    host += list.substr(close + 1, rest_end == std::string::npos ? rest_end : rest_end - close - 1);
  return host;
}

}  // namespace fsdp::comm
