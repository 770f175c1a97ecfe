// One rank's process, as the launcher sees it.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

namespace fsdp::comm {

/// What a process starts with; all memory is made before the fork.
struct ChildStart {
  std::vector<std::string> argv;
  std::vector<std::string> environment;  ///< "NAME=value"
  int socket = -1;                       ///< Inherited; a failing exec is reported through it.
};

/// Forks and executes in a process group of its own, which the kernel kills when this thread ends.
/// Signals are unblocked and a terminal's input is replaced by /dev/null. Throws HostResourceError.
pid_t start_child(const ChildStart& start);

/// The wait status of a child that has ended, after everything else in its process group was
/// killed; none while it runs.
std::optional<int> reap_child(pid_t pid);

/// News of a child since the last call: the signal that stopped it, 0 if it was continued.
std::optional<int> stop_or_continue_of_child(pid_t pid);

/// "SIGKILL", "SIGSEGV", "signal 42".
std::string signal_name(int number);

}  // namespace fsdp::comm
