#include "libfsdp/checkpoint/isolated.h"

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <span>
#include <vector>

#include "libfsdp/base/error.h"

namespace fsdp::checkpoint {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kShadowMemory = true;  // A sanitizer maps terabytes; a limit would end it at once.
#else
constexpr bool kShadowMemory = false;
#endif

// First byte of what the child sends.
constexpr char kResult = 'R';
constexpr char kError = 'E';

void limit(int resource, int64_t value) {
  const rlimit limits{static_cast<rlim_t>(value), static_cast<rlim_t>(value)};
  ::setrlimit(static_cast<__rlimit_resource_t>(resource), &limits);
}

int64_t address_space_bytes() {
  long pages = 0;
  if (FILE* file = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(file, "%ld", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  return int64_t{pages} * ::sysconf(_SC_PAGESIZE);
}

#if defined(__x86_64__)
/// The kernel answers EPERM to what only an attacker would ask for. Best effort: without it there
/// still are the limits, and a reader that calls nothing.
void refuse_system_calls() {
  constexpr std::array<uint32_t, 34> kRefused = {SYS_execve,
                                                 SYS_execveat,
                                                 SYS_fork,
                                                 SYS_vfork,
                                                 SYS_clone,
                                                 SYS_clone3,
                                                 SYS_socket,
                                                 SYS_socketpair,
                                                 SYS_connect,
                                                 SYS_bind,
                                                 SYS_listen,
                                                 SYS_accept,
                                                 SYS_sendto,
                                                 SYS_sendmsg,
                                                 SYS_ptrace,
                                                 SYS_process_vm_readv,
                                                 SYS_process_vm_writev,
                                                 SYS_unlink,
                                                 SYS_unlinkat,
                                                 SYS_rename,
                                                 SYS_renameat,
                                                 SYS_renameat2,
                                                 SYS_rmdir,
                                                 SYS_mkdir,
                                                 SYS_mkdirat,
                                                 SYS_link,
                                                 SYS_linkat,
                                                 SYS_symlink,
                                                 SYS_symlinkat,
                                                 SYS_chmod,
                                                 SYS_truncate,
                                                 SYS_mount,
                                                 SYS_creat,
                                                 SYS_openat2};
  constexpr uint32_t kWriting = O_WRONLY | O_RDWR | O_CREAT | O_TRUNC;
  std::vector<sock_filter> program;
  const auto load = [&](size_t offset) {
    program.push_back(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, static_cast<uint32_t>(offset)));
  };
  const sock_filter refuse = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
  load(offsetof(seccomp_data, arch));
  program.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0));
  program.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL));
  load(offsetof(seccomp_data, nr));
  for (const uint32_t call : kRefused) {
    program.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1));
    program.push_back(refuse);
  }
  // Opening to write: flags are the second argument of open, the third of openat.
  for (const auto& [call, argument] : {std::pair<uint32_t, size_t>{SYS_open, 1}, {SYS_openat, 2}}) {
    program.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 4));
    load(offsetof(seccomp_data, args) + argument * sizeof(uint64_t));
    program.push_back(BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, kWriting, 0, 1));
    program.push_back(refuse);
    program.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  }
  program.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  const sock_fprog filter{static_cast<unsigned short>(program.size()), program.data()};
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)
    ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0);
}
#else
void refuse_system_calls() {}
#endif

void enter_isolation(const IsolationLimits& limits) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  limit(RLIMIT_CORE, 0);
  limit(RLIMIT_FSIZE, 0);
  limit(RLIMIT_CPU, limits.cpu_seconds);
  if (!kShadowMemory) limit(RLIMIT_AS, address_space_bytes() + limits.memory_bytes);
  refuse_system_calls();
}

void write_all(int descriptor, std::string_view text) {
  while (!text.empty()) {
    const ssize_t put = ::write(descriptor, text.data(), text.size());
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) ::_exit(1);
    text.remove_prefix(static_cast<size_t>(put));
  }
}

[[noreturn]] void be_child(int descriptor, const std::function<std::string()>& work,
                           const IsolationLimits& limits) {
  enter_isolation(limits);
  std::string message;
  char tag = kError;
  try {
    message = work();
    tag = kResult;
  } catch (const std::bad_alloc&) {
    message = cat("reading it needs more than ", limits.memory_bytes >> 20, " MiB of memory");
  } catch (const std::exception& error) {
    message = error.what();
  }
  write_all(descriptor, std::string_view(&tag, 1));
  write_all(descriptor, message);
  ::_exit(0);
}

/// Everything until the child closes the pipe, at most `most` bytes.
std::string read_all(int descriptor, int64_t most) {
  std::string text;
  std::vector<char> buffer(1 << 16);
  for (;;) {
    const ssize_t got = ::read(descriptor, buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return text;
    text.append(buffer.data(), static_cast<size_t>(got));
    if (static_cast<int64_t>(text.size()) > most) return text;
  }
}

std::string ending(int status) {
  if (WIFSIGNALED(status)) {
    const int signal = WTERMSIG(status);
    if (signal == SIGXCPU || signal == SIGKILL) return "took too long and was stopped";
    return cat("ended with signal ", signal);
  }
  return cat("ended with code ", WEXITSTATUS(status));
}

}  // namespace

std::string run_isolated(std::string_view what, const std::function<std::string()>& work,
                         const IsolationLimits& limits) {
  std::array<int, 2> ends;
  if (::pipe2(ends.data(), O_CLOEXEC) != 0)
    throw HostResourceError(cat(what, ": no pipe: ", std::strerror(errno)));
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    ::close(ends[0]);
    be_child(ends[1], work, limits);
  }
  const int fork_error = errno;
  ::close(ends[1]);
  if (child < 0) {
    ::close(ends[0]);
    throw HostResourceError(cat(what, ": no child process: ", std::strerror(fork_error)));
  }
  std::string text = read_all(ends[0], limits.result_bytes);
  ::close(ends[0]);
  const bool too_long = static_cast<int64_t>(text.size()) > limits.result_bytes;
  if (too_long) ::kill(child, SIGKILL);
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (too_long) throw ModelError(cat(what, ": its description is too long"));
  if (text.empty() || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
    throw ModelError(cat(what, ": the process that read it ", ending(status)));
  const bool is_error = text.front() == kError;
  text.erase(0, 1);
  if (is_error) throw ModelError(cat(what, ": ", text));
  return text;
}

}  // namespace fsdp::checkpoint
