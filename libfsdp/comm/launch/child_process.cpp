#include "libfsdp/comm/launch/child_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/control/report.h"

namespace fsdp::comm {
namespace {

std::vector<char*> pointers(const std::vector<std::string>& texts) {
  std::vector<char*> all;
  for (const std::string& text : texts) all.push_back(const_cast<char*>(text.c_str()));
  all.push_back(nullptr);
  return all;
}

// Between fork and exec: system calls only, until something has gone wrong.
[[noreturn]] void become_program(const ChildStart& start, char** argv, char** environment,
                                 pid_t launcher) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != launcher) _exit(1);  // It died before the line above.
  setpgid(0, 0);
  fcntl(start.socket, F_SETFD, 0);
  if (isatty(STDIN_FILENO) ==
      1) {  // Outside the terminal's foreground group a read would stop the rank.
    const int nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (nothing >= 0) dup2(nothing, STDIN_FILENO);
  }
  sigset_t held;
  sigemptyset(&held);
  sigaddset(&held, SIGUSR1);
  sigaddset(&held, SIGUSR2);
  sigprocmask(SIG_SETMASK, &held, nullptr);
  execvpe(argv[0], argv, environment);
  send_report(start.socket, {.code = static_cast<int>(ExitCode::kConfig),
                             .text = cat("cannot start '", argv[0], "': ", strerror(errno))});
  _exit(static_cast<int>(ExitCode::kConfig));
}

}  // namespace

pid_t start_child(const ChildStart& start) {
  const std::vector<char*> argv = pointers(start.argv);
  const std::vector<char*> environment = pointers(start.environment);
  const pid_t launcher = getpid();
  const pid_t pid = fork();
  if (pid < 0) throw HostResourceError(cat("[launcher] cannot start a process: ", strerror(errno)));
  if (pid == 0)
    become_program(start, const_cast<char**>(argv.data()), const_cast<char**>(environment.data()),
                   launcher);
  setpgid(pid,
          pid);  // Whoever comes first; afterwards a signal to the group reaches it for certain.
  return pid;
}

std::optional<int> reap_child(pid_t pid) {
  siginfo_t info{};
  if (waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOHANG | WNOWAIT) != 0 ||
      info.si_pid != pid) {
    return std::nullopt;
  }
  // While it is a zombie its number, and so its group's, belongs to nobody else.
  kill(-pid, SIGKILL);
  int status = 0;
  waitpid(pid, &status, 0);
  return status;
}

std::optional<int> stop_or_continue_of_child(pid_t pid) {
  siginfo_t info{};
  if (waitid(P_PID, static_cast<id_t>(pid), &info, WSTOPPED | WCONTINUED | WNOHANG) != 0 ||
      info.si_pid != pid) {
    return std::nullopt;
  }
  return info.si_code == CLD_STOPPED ? info.si_status : 0;
}

std::string signal_name(int number) {
  const char* name = sigabbrev_np(number);
  return name == nullptr ? cat("signal ", number) : cat("SIG", name);
}

}  // namespace fsdp::comm
