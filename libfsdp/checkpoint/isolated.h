// Work on files that may be hostile, in a process that can do no harm.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace fsdp::checkpoint {

struct IsolationLimits {
  int64_t memory_bytes = int64_t{4} << 30;  ///< Above what the process has when it starts.
  int64_t cpu_seconds = 300;
  int64_t result_bytes = int64_t{512} << 20;
};

/// Runs `work` in a forked child and returns its text.
///
/// The child may read files and compute. It has the limits, can write no file, and (on x86-64)
/// the kernel refuses it to start programs or processes, to open sockets, to open files for
/// writing, to remove or rename them, and to signal others. `what` starts every message.
/// Throws: ModelError with the text of an Error that `work` threw, or saying how the child ended
/// when it crashed or ran into a limit; HostResourceError when there can be no child.
std::string run_isolated(std::string_view what, const std::function<std::string()>& work,
                         const IsolationLimits& limits = {});

}  // namespace fsdp::checkpoint
