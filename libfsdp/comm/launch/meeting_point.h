// Where ranks on several hosts meet.
#pragma once

#include <functional>
#include <optional>
#include <string>

namespace fsdp::comm {

/// Note [Meeting point] Rank 0 listens at MASTER_ADDR (under srun: the step's first host) and only
/// there, at the first of
///   FSDP_RENDEZVOUS_PORT;
///   MASTER_PORT, or the one above where torchrun's own store holds that one
///     (TORCHELASTIC_USE_AGENT_STORE);
///   15000 + the last four digits of SLURM_JOB_ID;
///   29500.
/// Callers must show a token, the first of
///   FSDP_RENDEZVOUS_TOKEN;
///   TORCHELASTIC_RUN_ID; SLURM_JOB_ID and SLURM_STEP_ID; PMIX_NAMESPACE (Open MPI).
/// Only FSDP_RENDEZVOUS_TOKEN is a secret; the others keep runs apart.
struct MeetingPoint {
  std::string host;
  int port = 0;
  std::string token;
  std::string token_from;  ///< The variable's name, for people.
};

/// Looks up an environment variable; absent and empty are the same.
using Environment = std::function<std::string(const char* name)>;

/// Throws ConfigError where the environment does not say enough.
MeetingPoint meeting_point_of(const Environment& environment);

/// The first host of SLURM's "node[03-05,9],login2": "node03".
std::string first_slurm_host(const std::string& list);

}  // namespace fsdp::comm
