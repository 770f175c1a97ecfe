// Signals as requests: a run that is told to end saves a checkpoint first.
#pragma once

namespace fsdp::trainer {

/// From here on SIGINT and SIGTERM end the process with exit code 130: with a line of its own, or
/// silently where a launcher says it. Once a process, before ranks join.
void handle_interrupts(bool has_launcher);

/// While it lives, SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and an end instead, and SIGUSR2
/// for a checkpoint. A second signal to end, half a second after the first or later (a launcher may
/// hand on what this process was sent as well), ends the process at once with 130. One at a time in
/// a process; signals that are ignored (nohup) stay so.
class SignalRequests {
 public:
  /// Until ask() signals to end still end at once: nothing has been done that could be lost.
  SignalRequests();
  ~SignalRequests();
  SignalRequests(const SignalRequests&) = delete;
  SignalRequests& operator=(const SignalRequests&) = delete;

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
