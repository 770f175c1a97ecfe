// Threads that no signal disturbs.
#pragma once

#include <pthread.h>

#include <csignal>
#include <thread>

namespace fsdp::comm {

/// Runs fn in a thread that gets no signals: those are for the program's own threads.
template <class Fn>
std::thread start_quiet_thread(Fn fn) {
  struct Blocked {
    Blocked() {
      sigset_t all;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
    }
    ~Blocked() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
    sigset_t before;
  };
  const Blocked blocked;  // Also undone when there is no room for a thread.
  return std::thread(std::move(fn));
}

}  // namespace fsdp::comm
