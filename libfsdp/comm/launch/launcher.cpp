#include "libfsdp/comm/launch/launcher.h"

#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <optional>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/control/report.h"
#include "libfsdp/comm/host/shm_world.h"
#include "libfsdp/comm/launch/child_process.h"
#include "libfsdp/comm/launch/failure_log.h"
#include "libfsdp/comm/launch/rank_health.h"

extern char** environ;

namespace fsdp::comm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kLookMs = 250;  // Between two looks at the ranks' health.
constexpr int kForwarded[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2};

int usable_cores() {
  cpu_set_t cores;
  return sched_getaffinity(0, sizeof(cores), &cores) == 0 ? CPU_COUNT(&cores) : 1;
}

/// Receives the launcher's signals as data, and gives them back their old effect at the end.
class SignalSource {
 public:
  SignalSource() {
    sigset_t wanted;
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGCHLD);
    // What the launcher was told to ignore (nohup) stays ignored.
    for (const int number : {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, SIGTSTP}) {
      struct sigaction now {};
      sigaction(number, nullptr, &now);
      if (now.sa_handler != SIG_IGN) sigaddset(&wanted, number);
    }
    struct sigaction reap {};
    reap.sa_handler = SIG_DFL;  // If it is ignored, children vanish without a status.
    sigaction(SIGCHLD, &reap, &child_before_);
    sigprocmask(SIG_BLOCK, &wanted, &mask_before_);
    fd_ = FileDescriptor(signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK));
    if (!fd_) throw HostResourceError(cat("[launcher] cannot watch signals: ", strerror(errno)));
  }
  ~SignalSource() {
    while (next() != 0) {
    }
    sigprocmask(SIG_SETMASK, &mask_before_, nullptr);
    sigaction(SIGCHLD, &child_before_, nullptr);
  }
  int fd() const { return fd_.get(); }
  /// Number of a pending signal, 0 = none.
  int next() {
    signalfd_siginfo info{};
    return read(fd_.get(), &info, sizeof(info)) == sizeof(info) ? static_cast<int>(info.ssi_signo)
                                                                : 0;
  }

 private:
  FileDescriptor fd_;
  sigset_t mask_before_{};
  struct sigaction child_before_ {};
};

struct Rank {
  pid_t pid = -1;
  FileDescriptor socket;
  bool running = false;
  bool reported = false;
  bool killed_here = false;
  RankHealth health;
};

class Launch {
 public:
  Launch(int nproc, const std::vector<std::string>& argv, const LaunchOptions& options)
      : options_(options),
        comm_(options.comm.value_or(comm_options_from_environment())),
        argv_(argv),
        ranks_(nproc) {
    if (options_.name.empty()) options_.name = argv.at(0).substr(argv.at(0).rfind('/') + 1);
  }
  ~Launch() {
    kill_running();
    reap_all_waiting();
  }

  int run() {
    start_all();
    while (running() > 0) wait_for_events();
    return verdict();
  }

 private:
  void start_all() {
    std::vector<RankParts> parts = make_shm_world(static_cast<int>(ranks_.size()));
    control_memory_ = map_control(parts[0]);
    control_ = ControlView::open(control_memory_->data(), control_memory_->bytes());
    std::vector<FileDescriptor> ends(ranks_.size());
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      std::tie(ranks_[rank].socket, ends[rank]) = make_socket_pair();
      send_parts(ranks_[rank].socket.get(), parts[rank]);
    }
    parts.clear();  // From here on only the rank itself holds its links, so that its death closes
                    // them.
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      ranks_[rank].pid = start_child(
          {argv_, environment_of(static_cast<int>(rank), ends[rank].get()), ends[rank].get()});
      ranks_[rank].running = true;
      ends[rank].reset();
    }
  }

  std::vector<std::string> environment_of(int rank, int socket) const {
    const auto size = static_cast<int>(ranks_.size());
    std::vector<std::string> own = {cat("RANK=", rank), cat("LOCAL_RANK=", rank),
                                    cat("WORLD_SIZE=", size), cat("LOCAL_WORLD_SIZE=", size),
                                    cat("FSDP_LAUNCH_FD=", socket)};
    if (getenv("OMP_NUM_THREADS") == nullptr)
      own.push_back(cat("OMP_NUM_THREADS=", std::max(1, usable_cores() / size)));
    for (char** entry = environ; *entry != nullptr; ++entry) {
      const std::string_view text(*entry);
      const std::string_view name = text.substr(0, text.find('=') + 1);
      const bool replaced = std::any_of(own.begin(), own.end(),
                                        [&](const auto& mine) { return mine.starts_with(name); });
      if (!replaced) own.emplace_back(text);
    }
    return own;
  }

  int running() const {
    return static_cast<int>(
        std::count_if(ranks_.begin(), ranks_.end(), [](const Rank& one) { return one.running; }));
  }

  void wait_for_events() {
    std::vector<pollfd> watched{{signals_.fd(), POLLIN, 0}};
    for (const Rank& one : ranks_)
      watched.push_back({one.socket ? one.socket.get() : -1, POLLIN, 0});
    poll(watched.data(), watched.size(), milliseconds_to_deadline());
    // Reports first: a rank that reports and ends at once must be known by its own words.
    for (size_t rank = 0; rank < ranks_.size(); ++rank) read_reports(static_cast<int>(rank));
    while (const int number = signals_.next()) on_signal(number);
    for (size_t rank = 0; rank < ranks_.size(); ++rank) reap(static_cast<int>(rank));
    look_after_running();
    if (kill_at_ && Clock::now() >= *kill_at_) kill_running();
  }

  int milliseconds_to_deadline() const {
    if (!kill_at_) return kLookMs;
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(*kill_at_ - Clock::now()).count();
    return static_cast<int>(std::clamp<int64_t>(left + 1, 10, kLookMs));
  }

  void look_after_running() {
    const int64_t now = monotonic_ns();
    // A long pause means that this process was stopped, maybe together with the ranks: that time
    // does not count.
    const double elapsed_s =
        std::min(1e-9 * static_cast<double>(now - last_look_ns_), 2e-3 * kLookMs);
    last_look_ns_ = now;
    for (size_t i = 0; i < ranks_.size(); ++i) {
      if (!ranks_[i].running) continue;
      const auto rank = static_cast<int>(i);
      ranks_[i].health.look(ranks_[i].pid, control_.rank(rank), elapsed_s);
      const std::string complaint = ranks_[i].health.complaint(comm_.peer_timeout_s);
      if (complaint.empty() || ranks_[i].reported) continue;
      ranks_[i].reported = true;
      add_failure(rank, static_cast<int>(ExitCode::kComm), complaint);
    }
  }

  void read_reports(int rank) {
    while (ranks_[rank].socket) {
      const Message message = receive_message(ranks_[rank].socket.get(), 0);
      if (message.closed) ranks_[rank].socket.reset();
      if (message.bytes.empty()) return;
      if (const std::optional<FailureReport> report = parse_report(message.bytes)) {
        ranks_[rank].reported = true;
        failures_.add(control_, failure_of(control_, rank, *report));
        end_the_others();
      }
    }
  }

  void reap(int rank) {
    Rank& one = ranks_[rank];
    if (!one.running) return;
    const std::optional<int> status = reap_child(one.pid);
    if (!status) return;
    one.running = false;
    read_reports(rank);
    one.socket.reset();
    if (one.killed_here || one.reported) return;
    if (WIFSIGNALED(*status)) return on_killed(rank, WTERMSIG(*status));
    const int code = WEXITSTATUS(*status);
    if (code == static_cast<int>(ExitCode::kStoppedWithCheckpoint) ||
        code == static_cast<int>(ExitCode::kInterrupted)) {
      orderly_code_ = std::max(orderly_code_, code);
      if (code == static_cast<int>(ExitCode::kInterrupted)) interrupted_by_ = last_forwarded_;
      // Others may never hear of it: it has not left them in order.
      if (control_.rank(rank).presence.load() != Presence::kLeft) schedule_kill();
    } else if (code == 0) {
      failures_.ended_in_order(rank);
    } else {
      add_failure(rank, code, cat(" ended with exit code ", code),
                  code == static_cast<int>(ExitCode::kComm));
    }
  }

  void on_killed(int rank, int number) {
    if (number == last_forwarded_) {  // It had no handler, or not yet.
      orderly_code_ = static_cast<int>(ExitCode::kInterrupted);
      interrupted_by_ = number;
      schedule_kill();
      return;
    }
    add_failure(rank, static_cast<int>(ExitCode::kComm),
                cat(" was killed by ", signal_name(number)));
  }

  void add_failure(int rank, int code, const std::string& what, bool consequence = false) {
    failures_.add(control_, {.rank = rank,
                             .code = code,
                             .consequence = consequence,
                             .at_ns = monotonic_ns(),
                             .text = cat(what, describe_end(look_at(control_, rank)))});
    // Those who wait need not find it out by themselves.
    if (!consequence) control_.abort(rank, cat("[comm] rank ", rank, what), rank);
    end_the_others();
  }

  void end_the_others() {
    kill_running(Presence::kAbsent);  // They could not know, and have nothing to put in order.
    schedule_kill();
  }

  void schedule_kill() {
    if (kill_at_) return;
    kill_at_ =
        Clock::now() + std::chrono::milliseconds(static_cast<int64_t>(options_.grace_s * 1000));
  }

  void on_signal(int number) {
    if (number == SIGCHLD) return;
    if (number == SIGTSTP) return stop_with_ranks();
    if (std::find(std::begin(kForwarded), std::end(kForwarded), number) == std::end(kForwarded))
      return;
    if ((number == SIGINT || number == SIGTERM) && ++requests_to_end_ >= 3) {
      orderly_code_ = static_cast<int>(ExitCode::kInterrupted);
      return kill_running();
    }
    last_forwarded_ = number;
    signal_running(number);
  }

  void stop_with_ranks() {
    signal_running(SIGSTOP);
    kill(getpid(), SIGSTOP);
    signal_running(SIGCONT);
  }

  void signal_running(int number) {
    for (const Rank& one : ranks_) {
      if (one.running) kill(one.pid, number);
    }
  }

  void kill_running(std::optional<Presence> only = {}) {
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      Rank& one = ranks_[rank];
      if (!one.running) continue;
      const Presence presence = control_.rank(static_cast<int>(rank)).presence.load();
      if (presence != only.value_or(presence)) continue;
      one.killed_here = true;
      kill(-one.pid, SIGKILL);
    }
  }

  void reap_all_waiting() {
    for (Rank& one : ranks_) {
      if (one.running) waitpid(one.pid, nullptr, 0);
    }
  }

  int verdict() {
    const bool interrupted = orderly_code_ == static_cast<int>(ExitCode::kInterrupted);
    // A rank that lost its peer to an interrupt is no failure either.
    if (!failures_.empty() && !(interrupted && failures_.only_consequences())) {
      const Failure cause = *failures_.cause(control_);
      if (const std::string others = failures_.others(cause); !others.empty())
        say(cat(kStatesTitle, others));
      say(cat("rank ", cause.rank, cause.text));
      return cause.code;
    }
    if (interrupted) {
      say(interrupted_by_ == 0
              ? "interrupted, nothing saved"
              : cat("interrupted by ", signal_name(interrupted_by_), ", nothing saved"));
    }
    return orderly_code_;
  }

  void say(const std::string& text) const {
    // A rank that was killed may have left its progress bar.
    const bool terminal = isatty(STDERR_FILENO) == 1;
    const std::string line = cat(terminal ? "\r\x1b[K" : "", options_.name, ": ", text, "\n");
    std::fflush(stdout);
    [[maybe_unused]] const auto written = write(STDERR_FILENO, line.data(), line.size());
  }

  LaunchOptions options_;
  CommOptions comm_;
  const std::vector<std::string>& argv_;
  SignalSource signals_;
  std::vector<Rank> ranks_;
  std::shared_ptr<Mapping> control_memory_;
  ControlView control_;
  FailureLog failures_;
  int64_t last_look_ns_ = monotonic_ns();
  std::optional<Clock::time_point> kill_at_;
  int last_forwarded_ = 0;
  int interrupted_by_ = 0;
  int requests_to_end_ = 0;
  int orderly_code_ = 0;
};

}  // namespace

int launch_local(int nproc, const std::vector<std::string>& argv, const LaunchOptions& options) {
  if (argv.empty()) throw ConfigError("[launcher] no program to start");
  if (nproc < 1 || nproc > kMaxRanks) {
    throw ConfigError(cat("[launcher] ", nproc, " ranks; expected 1 to ", kMaxRanks));
  }
  std::fflush(nullptr);  // What is buffered now must not be printed once more by each rank.
  return Launch(nproc, argv, options).run();
}

}  // namespace fsdp::comm
