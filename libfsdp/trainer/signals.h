// Signals as requests: a run that is told to end saves a checkpoint first.
#pragma once

namespace fsdp::trainer {

/// Of this process, among those of a run.
enum class SignalRole {
  kAlone,
  kRank,      ///< A launcher says what ended the run.
  kLauncher,  ///< Starts ranks, and hands signals on to them.
};

/// From here on SIGINT, SIGTERM and SIGUSR1 end the process with exit code 130, with a line of its
/// own unless it is a rank. SIGUSR2 is remembered: for SignalRequests, or for the ranks that will
/// be launched. Signals that are ignored (nohup) stay so. Before ranks join or are launched.
void handle_signals(SignalRole role);

/// From ask() on, SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and an end instead (which the
/// end of the process is, when the run is over: nothing is lost, and nothing was interrupted), and
/// SIGUSR2, since handle_signals(), for a checkpoint. A second signal to end, half a second after
/// the first or later (a launcher may hand on what this process was sent as well), ends the process
/// at once with 130. One in a process.
class SignalRequests {
 public:
  SignalRequests() = default;
  SignalRequests(const SignalRequests&) = delete;
  SignalRequests& operator=(const SignalRequests&) = delete;

  /// Until then signals to end end at once: nothing has been done that could be lost.
  void ask();
  /// The signal that asked for the end, 0 = none.
  int end_signal() const;
  /// Another rank was asked to end: a signal to this one is a second one.
  void note_end(int number);
  /// Whether a checkpoint was asked for since the last call.
  bool take_save();
};

/// "SIGTERM".
const char* signal_text(int number);

}  // namespace fsdp::trainer
