// How a process becomes a rank.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/options.h"

namespace fsdp::comm {

/// A world as its launcher describes it.
struct WorldPlace {
  int rank = 0;
  int size = 1;
  int local_rank = 0;  ///< Among the ranks of this host.
  int local_size = 1;
  std::string host;   ///< Of rank 0, for worlds of several hosts.
  int port = 0;       ///< Where rank 0 may listen there.
  std::string token;  ///< That all ranks know, and nobody else should.
  double rendezvous_timeout_s = 60;
  /// The same ranks, already joined, when all are on this host; then host, port and token are not
  /// set.
  std::unique_ptr<Communicator> local;
};

/// Another way for ranks to reach each other than this host's memory.
struct Transport {
  std::string name;  ///< For FSDP_COMM.
  std::function<std::unique_ptr<Communicator>(WorldPlace, const CommOptions&)> join;
};

/// Where the memory of a world's parameters is.
enum class DeviceUse {
  kHost,  ///< Unless FSDP_COMM=nccl or cuda_ipc.
  kAuto,  ///< On GPUs, where this host has one: for programs that compute where the communicator's
          ///< memory is. FSDP_COMM=shm, or another transport of hosts, keeps it on the host.
};

struct JoinOptions {
  DeviceUse device = DeviceUse::kHost;
  std::optional<CommOptions> comm;  ///< Without: comm_options_from_environment().
  /// What this program was built with. The first serves worlds of several hosts; FSDP_COMM=name
  /// chooses one (shm: none of them) for any world.
  std::vector<Transport> transports;
  double rendezvous_timeout_s =
      60;  ///< How long to wait for the other ranks to start, without our launcher.
};

/// The world that this process was started in.
///
/// - by launch_local (FSDP_LAUNCH_FD): its ranks;
/// - by torchrun, srun or mpirun on one host (RANK and WORLD_SIZE, or the SLURM, Open MPI or PMI
/// names): its ranks, who
///   find each other over an abstract UNIX socket; nothing listens on the network, and other users
///   are refused;
///   With ranks on several hosts they meet at rank 0, which listens on one address and port until
///   all have come: see Note [Meeting point];
/// - else: one rank.
/// Collective over the processes that were started together. Call it once a process.
/// Throws ConfigError (contradictory or incomplete environment), CommError (a rank did not
/// come), HostResourceError.
std::unique_ptr<Communicator> join(const JoinOptions& options = {});

/// RANK as join() will find it, before joining: for log labels and for work that only rank 0 does.
struct RankPlace {
  int rank = 0;
  int size = 1;
  int local_rank = 0;
  int local_size = 1;
};
RankPlace place_from_environment();
/// True in a process that some launcher started as one of several ranks (or ours as the only one):
/// it must join, not launch.
bool started_as_rank();

struct RankOptions {
  JoinOptions join;
  std::string name = "fsdp";  ///< Program name before error lines.
};

/// Joins the world, runs fn and returns its value: the body of a rank's main().
///
/// An exception of fn becomes the exit code (fsdp::Error's own; 7 for bad_alloc; 1 otherwise). It
/// is told to the peers, whose waits end, and to the launcher, which prints it as the cause;
/// without our launcher it is printed here as "name: rank 1: text". With peers the process then
/// ends at once, without destructors, so that nothing can hang. Exceptions that leave a thread or a
/// noexcept function are reported in the same way.
int run_rank(const std::function<int(Communicator&)>& fn, const RankOptions& options = {});

}  // namespace fsdp::comm
