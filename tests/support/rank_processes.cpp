#include "tests/support/rank_processes.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <filesystem>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/host/shm_world.h"
#include "libfsdp/comm/launch/child_process.h"

extern char** environ;

namespace fsdp::testing {

std::string this_program() { return std::filesystem::read_symlink("/proc/self/exe").string(); }

struct ChildProgram::State {
  pid_t pid = -1;
  comm::FileDescriptor log;
  std::optional<int> status;
};

namespace {

std::vector<std::string> with_own_environment(std::vector<std::string> environment) {
  for (char** entry = environ; *entry != nullptr; ++entry) environment.emplace_back(*entry);
  return environment;
}

// The child inherits this process's stdout and stderr, so they point at the log for the moment of
// the fork.
class OutputInto {
 public:
  explicit OutputInto(int fd) {
    for (int i : {0, 1}) {
      kept_[i] = fcntl(i + 1, F_DUPFD_CLOEXEC, 3);
      dup2(fd, i + 1);
    }
  }
  ~OutputInto() {
    for (int i : {0, 1}) {
      dup2(kept_[i], i + 1);
      close(kept_[i]);
    }
  }

 private:
  std::array<int, 2> kept_{};
};

}  // namespace

ChildProgram::ChildProgram(std::vector<std::string> argv, std::vector<std::string> environment,
                           int socket)
    : state_(std::make_unique<State>()) {
  std::fflush(nullptr);
  state_->log = comm::FileDescriptor(memfd_create("test log", MFD_CLOEXEC));
  fcntl(state_->log.get(), F_SETFL, O_APPEND);  // Several processes write to it.
  const OutputInto redirected(state_->log.get());
  state_->pid =
      comm::start_child({std::move(argv), with_own_environment(std::move(environment)), socket});
}

ChildProgram::ChildProgram(ChildProgram&&) noexcept = default;

ChildProgram& ChildProgram::operator=(ChildProgram&& other) noexcept {
  std::swap(state_, other.state_);
  return *this;
}

ChildProgram::~ChildProgram() {
  if (!state_ || state_->status) return;
  kill(-state_->pid, SIGKILL);
  waitpid(state_->pid, nullptr, 0);
}

pid_t ChildProgram::pid() const { return state_->pid; }

void ChildProgram::signal(int number) const { kill(state_->pid, number); }

std::optional<int> ChildProgram::wait(double timeout_s) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_s);
  while (!state_->status) {
    state_->status = comm::reap_child(state_->pid);
    if (state_->status || std::chrono::steady_clock::now() > end) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return state_->status;
}

std::string ChildProgram::output() const {
  std::string text;
  std::array<char, 4096> part;
  ssize_t got;
  while ((got = pread(state_->log.get(), part.data(), part.size(),
                      static_cast<off_t>(text.size()))) > 0) {
    text.append(part.data(), static_cast<size_t>(got));
  }
  return text;
}

std::vector<ChildProgram> start_ranks(int world, const std::vector<std::string>& argv,
                                      const std::vector<std::string>& environment) {
  std::vector<ChildProgram> ranks;
  std::vector<std::pair<comm::FileDescriptor, comm::FileDescriptor>> sockets;
  std::vector<comm::RankParts> parts = comm::make_shm_world(world);
  for (int rank = 0; rank < world; ++rank) {
    sockets.push_back(comm::make_socket_pair());
    comm::send_parts(sockets[rank].first.get(), parts[rank]);
  }
  parts.clear();
  for (int rank = 0; rank < world; ++rank) {
    const int socket = sockets[rank].second.get();
    auto own = environment;
    own.push_back(cat("FSDP_LAUNCH_FD=", socket));
    own.push_back(cat("RANK=", rank));
    own.push_back(cat("WORLD_SIZE=", world));
    ranks.emplace_back(argv, own, socket);
  }
  return ranks;
}

std::string describe_status(const std::optional<int>& status) {
  if (!status) return "still running";
  return WIFSIGNALED(*status) ? comm::signal_name(WTERMSIG(*status))
                              : cat("exit ", WEXITSTATUS(*status));
}

}  // namespace fsdp::testing
