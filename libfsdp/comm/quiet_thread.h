// Threads that no signal disturbs.
#pragma once

#include <pthread.h>

#include <csignal>
#include <thread>

namespace fsdp::comm {

/// Runs fn in a thread that gets no signals: those are for the program's own threads.
template <class Fn>
std::thread start_quiet_thread(Fn fn) {
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread(std::move(fn));
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

}  // namespace fsdp::comm
