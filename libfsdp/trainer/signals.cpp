#include "libfsdp/trainer/signals.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>

#include "libfsdp/base/error.h"
#include "libfsdp/trainer/progress.h"

namespace fsdp::trainer {
namespace {

constexpr int64_t kSameSignalNs = 500'000'000;

// What handlers may touch.
std::atomic<bool> launched{false};
std::atomic<bool> asks{false};
std::atomic<int> end_number{0};
std::atomic<int64_t> end_at_ns{0};
std::atomic<int> saves{0};

int64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

void write_text(const char* text) {
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, text, std::strlen(text));
}

[[noreturn]] void interrupt(int number) {
  wipe_bar_from_signal();
  if (!launched) {
    write_text("finetune: interrupted by ");
    write_text(signal_text(number));
    write_text(end_number != 0 ? ", before a checkpoint was saved\n" : ", nothing saved\n");
  }
  ::_exit(static_cast<int>(ExitCode::kInterrupted));
}

void on_end(int number) {
  if (!asks) interrupt(number);
  int none = 0;
  if (end_number.compare_exchange_strong(none, number)) {
    end_at_ns = now_ns();
  } else if (now_ns() - end_at_ns >= kSameSignalNs) {
    interrupt(number);
  }
}

void on_save(int) { ++saves; }

/// Handlers of this thread run on a stack of their own: oneDNN's compiled matrix products keep
/// values further below the stack pointer than a signal's frame leaves alone.
void use_own_stack() {
  alignas(64) static std::byte stack[64 << 10];
  const stack_t own{.ss_sp = stack, .ss_flags = 0, .ss_size = sizeof stack};
  ::sigaltstack(&own, nullptr);
}

/// Takes the signal unless it is ignored.
void take(int number, void (*handler)(int)) {
  struct sigaction now {};
  ::sigaction(number, nullptr, &now);
  if (now.sa_handler == SIG_IGN) return;
  struct sigaction wanted {};
  wanted.sa_handler = handler;
  wanted.sa_flags = SA_RESTART | SA_ONSTACK;
  sigemptyset(&wanted.sa_mask);
  ::sigaction(number, &wanted, nullptr);
}

}  // namespace

void handle_signals(SignalRole role) {
  launched = role == SignalRole::kRank;
  use_own_stack();
  for (const int number : {SIGINT, SIGTERM, SIGUSR1}) take(number, on_end);
  // Blocked, it waits until the launcher looks for signals.
  sigset_t save;
  sigemptyset(&save);
  sigaddset(&save, SIGUSR2);
  if (role == SignalRole::kLauncher) return void(::sigprocmask(SIG_BLOCK, &save, nullptr));
  take(SIGUSR2, on_save);
}

void SignalRequests::ask() { asks = true; }

int SignalRequests::end_signal() const { return end_number; }

void SignalRequests::note_end(int number) {
  int none = 0;
  if (end_number.compare_exchange_strong(none, number)) end_at_ns = now_ns();
}

bool SignalRequests::take_save() { return saves.exchange(0) > 0; }

const char* signal_text(int number) {
  switch (number) {
    case SIGINT:
      return "SIGINT";
    case SIGTERM:
      return "SIGTERM";
    case SIGUSR1:
      return "SIGUSR1";
    case SIGUSR2:
      return "SIGUSR2";
    default:
      return "a signal";
  }
}

}  // namespace fsdp::trainer
