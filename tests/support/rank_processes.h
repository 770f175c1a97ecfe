// Runs programs as ranks of a world of processes, without the launcher.
#pragma once

#include <sys/types.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace fsdp::testing {

/// A program's own path, for tests that start themselves again as a rank.
std::string this_program();

/// A child whose output is kept. It is killed, with its process group, when the object goes.
class ChildProgram {
 public:
  /// `environment` is added to this process's own; `socket` (or -1) is inherited under its number.
  ChildProgram(std::vector<std::string> argv, std::vector<std::string> environment,
               int socket = -1);
  ChildProgram(ChildProgram&&) noexcept;
  ChildProgram& operator=(ChildProgram&& other) noexcept;
  ~ChildProgram();

  pid_t pid() const;
  void signal(int number) const;
  /// Wait status, or none if it still runs after `timeout_s`.
  std::optional<int> wait(double timeout_s);
  /// What it has written to stdout and stderr so far.
  std::string output() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Starts `world` copies of `argv`; each finds its place by comm::join.
std::vector<ChildProgram> start_ranks(int world, const std::vector<std::string>& argv,
                                      const std::vector<std::string>& environment);

/// "exit 3", "SIGKILL", "still running".
std::string describe_status(const std::optional<int>& status);

}  // namespace fsdp::testing
