#include "libfsdp/comm/join.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "libfsdp/base/error.h"
#include "libfsdp/base/log.h"
#include "libfsdp/comm/device/device_transport.h"
#include "libfsdp/comm/host/shm_world.h"
#include "libfsdp/comm/host/thread_world.h"
#include "libfsdp/comm/launch/meeting_point.h"
#include "libfsdp/comm/launch/rendezvous.h"

namespace fsdp::comm {
namespace {

std::optional<int> integer_of(const char* name) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return std::nullopt;
  int value = 0;
  const auto [end, error] = std::from_chars(text, text + std::strlen(text), value);
  if (error != std::errc() || *end != '\0') {
    throw ConfigError(
        cat("[comm] environment variable ", name, "='", text, "': expected a whole number"));
  }
  return value;
}

/// The names by which one launcher tells its processes their places.
struct Dialect {
  const char* mark;  // Set by this launcher for its processes only.
  const char* rank;
  const char* size;
  const char* local_rank;
  const char* local_size;
};

// srun's names are also set in a batch script, which is no rank: only SLURM_STEP_ID tells a step's
// process.
constexpr Dialect kDialects[] = {
    {"WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
    {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
     "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"},
    {"PMI_SIZE", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
    {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
     "SLURM_STEP_TASKS_PER_NODE"},
};

RankPlace place_in(const Dialect& dialect) {
  RankPlace place;
  place.size = integer_of(dialect.size).value_or(1);
  const std::optional<int> rank = integer_of(dialect.rank);
  if (!rank && place.size > 1) {
    throw ConfigError(
        cat("[comm] ", dialect.size, "=", place.size, " but ", dialect.rank, " is not set"));
  }
  place.rank = rank.value_or(0);
  place.local_rank = integer_of(dialect.local_rank).value_or(place.rank);
  const char* local_size = std::getenv(dialect.local_size);
  // SLURM writes "4(x2)" for two nodes, which is more than one host however it is read.
  const bool several = local_size != nullptr && std::strpbrk(local_size, "(,") != nullptr;
  place.local_size = several ? 0 : integer_of(dialect.local_size).value_or(place.size);
  if (place.size < 1 || place.rank < 0 || place.rank >= place.size) {
    throw ConfigError(cat("[comm] ", dialect.rank, "=", place.rank, " and ", dialect.size, "=",
                          place.size, ": expected 0 <= rank < size"));
  }
  return place;
}

std::string text_of(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? "" : text;
}

// What processes that were started together have in common, and others on this host have not.
std::string local_meeting_point() {
  std::string name;
  for (const char* part :
       {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
        "PMIX_NAMESPACE", "SLURM_JOB_ID", "SLURM_STEP_ID"}) {
    if (const std::string value = text_of(part); !value.empty())
      name += cat(name.empty() ? "" : "-", value);
  }
  return name.empty() ? cat("parent-", getppid()) : name;
}

/// What the launcher held back until handlers could stand.
void let_signals_in() {
  sigset_t held;
  sigemptyset(&held);
  sigaddset(&held, SIGUSR1);
  sigaddset(&held, SIGUSR2);
  sigprocmask(SIG_UNBLOCK, &held, nullptr);
}

std::unique_ptr<Communicator> join_launched(int socket, const JoinOptions& options) {
  let_signals_in();
  unsetenv("FSDP_LAUNCH_FD");  // It is this process's place, not that of a program which it starts.
  if (fcntl(socket, F_SETFD, FD_CLOEXEC) != 0) {
    throw ConfigError(cat("[comm] FSDP_LAUNCH_FD=", socket,
                          " is no open file. Hint: unset it to run a single process."));
  }
  RankParts parts = receive_parts(socket, options.rendezvous_timeout_s);
  return join_shm(std::move(parts), options.comm.value_or(comm_options_from_environment()));
}

/// What FSDP_COMM names; none for this host's memory, or if it is not set.
const Transport* chosen_transport(const JoinOptions& options) {
  const std::string name = text_of("FSDP_COMM");
  if (name.empty() || name == "shm" || is_device_transport(name)) return nullptr;
  std::string known = "shm, nccl, cuda_ipc";
  for (const Transport& transport : options.transports) {
    if (transport.name == name) return &transport;
    known += cat(", ", transport.name);
  }
  throw ConfigError(
      cat("[comm] environment variable FSDP_COMM='", name, "': this program knows ", known));
}

std::unique_ptr<Communicator> join_several_hosts(const RankPlace& place, const Transport* chosen,
                                                 const JoinOptions& options,
                                                 const CommOptions& comm) {
  const std::string asked = cat("[comm] the environment asks for ", place.size, " ranks of which ",
                                place.local_size, " are on this host; ");
  if (text_of("FSDP_COMM") == "shm") throw ConfigError(asked + "FSDP_COMM=shm reaches one host");
  if (chosen == nullptr && options.transports.empty())
    throw ConfigError(asked + "this program was built for one host");
  if (chosen == nullptr) chosen = &options.transports.front();
  MeetingPoint point = meeting_point_of([](const char* name) { return text_of(name); });
  if (place.rank == 0) {
    log::info(cat("ranks on several hosts meet at ", point.host, ":", point.port, " over ",
                  chosen->name, "; token from ", point.token_from));
  }
  WorldPlace world;
  world.rank = place.rank;
  world.size = place.size;
  world.local_rank = place.local_rank;
  world.local_size = place.local_size;
  world.host = std::move(point.host);
  world.port = point.port;
  world.token = std::move(point.token);
  world.rendezvous_timeout_s = options.rendezvous_timeout_s;
  return chosen->join(std::move(world), comm);
}

}  // namespace

RankPlace place_from_environment() {
  for (const Dialect& dialect : kDialects) {
    if (!text_of(dialect.mark).empty()) return place_in(dialect);
  }
  return {};
}

bool started_as_rank() {
  return !text_of("FSDP_LAUNCH_FD").empty() || place_from_environment().size > 1;
}

namespace {

std::unique_ptr<Communicator> join_host(const JoinOptions& options, const CommOptions& comm) {
  const Transport* chosen = chosen_transport(options);
  std::unique_ptr<Communicator> local;
  if (const std::optional<int> socket = integer_of("FSDP_LAUNCH_FD")) {
    local = join_launched(*socket, options);
  } else {
    const RankPlace place = place_from_environment();
    if (place.size == 1) return make_single();
    if (place.local_size != place.size) return join_several_hosts(place, chosen, options, comm);
    local = rendezvous(place.rank, place.size, local_meeting_point(), options.rendezvous_timeout_s,
                       comm);
  }
  if (chosen == nullptr || local->size() == 1) return local;
  WorldPlace world;
  world.rank = local->rank();
  world.size = local->size();
  world.local_rank = local->rank();
  world.local_size = local->size();
  world.rendezvous_timeout_s = options.rendezvous_timeout_s;
  world.local = std::move(local);
  return chosen->join(std::move(world), comm);
}

}  // namespace

std::unique_ptr<Communicator> join(const JoinOptions& options) {
  const CommOptions comm = options.comm.value_or(comm_options_from_environment());
  const std::string name = text_of("FSDP_COMM");
  std::unique_ptr<Communicator> host = join_host(options, comm);
  const bool forced = is_device_transport(name);
  const bool found = options.device == DeviceUse::kAuto && name.empty() && host_has_gpu();
  if (!forced && !found) return host;
  return on_device(std::move(host), comm, name);
}

}  // namespace fsdp::comm
