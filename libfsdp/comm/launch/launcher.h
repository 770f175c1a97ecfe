// Starts the ranks of one host and watches over them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "libfsdp/comm/options.h"

namespace fsdp::comm {

struct LaunchOptions {
  std::string name;      ///< Stands before the launcher's lines; empty = the program's file name.
  double grace_s = 1.0;  ///< Between a rank's failure and SIGKILL for those that are still there.
  /// What the ranks use too: only peer_timeout_s matters here. Without:
  /// comm_options_from_environment().
  std::optional<CommOptions> comm;
};

/// Runs `nproc` copies of `argv` (argv[0] = path of the program, looked up in PATH without a slash)
/// as ranks 0..nproc-1 of one world, waits until all are gone and returns the exit code for the
/// whole.
///
/// Each rank gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, FSDP_LAUNCH_FD (for join) and,
/// unless it is set, OMP_NUM_THREADS = cores / nproc. Ranks get /dev/null for a terminal's input.
/// Signals: SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 are handed on to every rank, once; a third
/// SIGINT or SIGTERM kills. A rank starts with SIGUSR1 and SIGUSR2 blocked, so that they wait for
/// the handlers that it may install before it joins; join() unblocks them. Ranks run in process
/// groups of their own, so a terminal's Ctrl-C reaches them through here only. Failure: the first
/// rank that fails on its own ends all others within grace_s plus a moment. A rank that is stopped,
/// or shows no sign of life, for peer_timeout_s has failed; one that ends with 0 has failed if
/// another still waits for it. The last line on stderr names the rank whose failure came first,
/// what it was doing and the cause; lines before it say what every other rank was doing at that
/// moment, whom it waited for and since when. A rank that ends with 75 (stopped, checkpoint saved)
/// or 130 is no failure. Returns: 0; the failing rank's exit code; 8 for a rank killed by a signal
/// and for a lost peer; 75 and 130 as the ranks say, 130 also for ranks that a handed-on signal
/// killed. If this process dies the ranks are killed by the kernel. Nothing is left behind: no
/// process, no file.
///
/// Call it from the main thread before other threads exist. Throws HostResourceError, ConfigError
/// (nproc).
int launch_local(int nproc, const std::vector<std::string>& argv,
                 const LaunchOptions& options = {});

}  // namespace fsdp::comm
