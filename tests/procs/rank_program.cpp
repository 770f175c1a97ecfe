// A program with ranks, for the process tests: rank_program [--launch N] MODE. Without --launch it
// is a rank itself.
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/join.h"
#include "libfsdp/comm/launch/launcher.h"

using fsdp::cat;
using fsdp::comm::Communicator;
using fsdp::comm::make_tag;

namespace {

volatile std::sig_atomic_t signalled = 0;

void on_signal(int number) { signalled = number; }

void sleep_ms(int milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void say(const std::string& text) {
  std::printf("%s\n", text.c_str());
  std::fflush(stdout);
}

/// Trains for a long time: a barrier every few milliseconds.
int work(Communicator& c) {
  c.barrier(make_tag("ready"));
  if (c.rank() == 0) say("working");
  for (int step = 0; step < 2000; ++step) {
    c.report_progress(step, "backward");
    c.barrier(make_tag("step", step));
    sleep_ms(5);
  }
  return 0;
}

/// Says who it is and ends well.
int greet(Communicator& c) {
  say(cat("rank ", c.rank(), " of ", c.size(), " sum ", c.sum(c.rank() + 1, "greeting"),
          " threads ", std::getenv("OMP_NUM_THREADS"), " local ", std::getenv("LOCAL_RANK"), "/",
          std::getenv("LOCAL_WORLD_SIZE")));
  c.barrier(make_tag("end"));
  return 0;
}

int fail_on_rank_1(Communicator& c, const std::function<void()>& fail) {
  c.report_progress(12, "forward");
  c.barrier(make_tag("ready"));
  if (c.rank() == 1) fail();
  c.barrier(make_tag("next", 12));
  return 0;
}

void segfault() {
  std::signal(SIGSEGV, SIG_DFL);  // A sanitizer would make it an exit code.
  std::raise(SIGSEGV);
}

int stop_in_order(Communicator& c, int code) {
  std::signal(SIGTERM, on_signal);
  std::signal(SIGINT, on_signal);
  std::signal(SIGUSR1, on_signal);
  c.barrier(make_tag("ready"));
  if (c.rank() == 0) say("working");
  while (c.maximum(signalled, "stop flag") == 0) sleep_ms(2);
  say(cat("rank ", c.rank(), " got ", signalled));
  sleep_ms(1500);  // A checkpoint takes longer than the grace of a failure.
  c.barrier(make_tag("saved"));
  return code;
}

/// Rank 1 ends or stops in the middle; the others say after how long they noticed.
int lose_rank_1(Communicator& c, int number) {
  c.barrier(make_tag("ready"));
  if (c.rank() == 1) {
    sleep_ms(100);
    std::raise(number);
    sleep_ms(60'000);
  }
  const double start = seconds_now();
  try {
    c.barrier(make_tag("never", 3));
  } catch (const fsdp::CommError& e) {
    say(cat("noticed after ", seconds_now() - start, " s: ", e.what()));
    throw;
  }
  return 0;
}

/// Rank 1 dies in the middle of step 7 while others wait for it in a gather; rank 2 computes.
int lose_rank_1_in_a_unit(Communicator& c) {
  const std::vector<std::string> names = {"root", "layers.0", "layers.1", "layers.2"};
  c.name_units(names);
  const auto memory = c.allocate(4096, "source");
  std::vector<std::byte> all(memory->bytes() * c.size());
  c.report_progress(7, "backward");
  c.barrier(make_tag("ready"));
  c.report_unit(3);
  if (c.rank() == 1) {
    sleep_ms(300);
    std::raise(SIGKILL);
  }
  if (c.rank() == 2) sleep_ms(700);
  c.finish(c.begin_gather(c.world(), {memory.get(), 0, memory->bytes()}, all.data(),
                          make_tag("gather", 7, 2)));
  return 0;
}

/// Rank 1 loops for ever in code of its own: only the limit of a collective finds it.
int spin_on_rank_1(Communicator& c) {
  c.report_progress(3, "forward");
  c.barrier(make_tag("ready"));
  for (volatile bool forever = true; forever && c.rank() == 1;) {
  }
  c.barrier(make_tag("next", 3));
  return 0;
}

/// Computes much longer than the peer time-out between two collectives: no failure.
int compute_long(Communicator& c) {
  c.barrier(make_tag("ready"));
  if (c.rank() == 1) {
    for (const double end = seconds_now() + 2.5; seconds_now() < end;) {
    }
  }
  c.barrier(make_tag("after"));
  return 0;
}

/// Rank 1 sleeps for 4 s in small pieces, so that being stopped does not shorten its sleep.
int sleep_long(Communicator& c) {
  c.barrier(make_tag("ready"));
  if (c.rank() == 0) say("working");
  for (int i = 0; c.rank() == 1 && i < 400; ++i) sleep_ms(10);
  c.barrier(make_tag("after"));
  return 0;
}

/// Rank 1 may not make large files: allocation fails there, and so everywhere; small ones still
/// work.
int lack_memory_on_rank_1(Communicator& c) {
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, SIG_IGN);
  if (c.rank() == 1) {
    const rlimit small{1 << 20, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
  }
  for (int i = 0; i < 3; ++i) {
    try {
      c.allocate(8 << 20, "gradients");
      return 1;
    } catch (const fsdp::HostResourceError& e) {
      say(cat("rank ", c.rank(), " ", e.what()));
    }
    const auto memory = c.allocate(64 << 10, "small");
    std::memset(memory->local(), c.rank() + 1, memory->bytes());
    std::vector<std::byte> all(memory->bytes() * c.size());
    c.finish(c.begin_gather(c.world(), {memory.get(), 0, memory->bytes()}, all.data(),
                            make_tag("gather")));
    for (size_t at = 0; at < all.size(); ++at) {
      if (static_cast<size_t>(all[at]) != at / memory->bytes() + 1) return 1;
    }
  }
  return 0;
}

/// Leaves a process of its own behind.
int leave_a_child(Communicator& c) {
  if (fork() == 0) {
    sleep_ms(600'000);
    _exit(0);
  }
  c.barrier(make_tag("end"));
  return 0;
}

int dispatch(const std::string& mode, Communicator& c) {
  const std::map<std::string, std::function<int()>> modes = {
      {"work", [&] { return work(c); }},
      {"greet", [&] { return greet(c); }},
      {"compute-long", [&] { return compute_long(c); }},
      {"sleep-long", [&] { return sleep_long(c); }},
      {"lack-memory", [&] { return lack_memory_on_rank_1(c); }},
      {"leave-a-child", [&] { return leave_a_child(c); }},
      {"lose-by-kill", [&] { return lose_rank_1(c, SIGKILL); }},
      {"lose-in-a-unit", [&] { return lose_rank_1_in_a_unit(c); }},
      {"spin", [&] { return spin_on_rank_1(c); }},
      {"lose-by-stop", [&] { return lose_rank_1(c, SIGSTOP); }},
      {"stop-with-checkpoint", [&] { return stop_in_order(c, 75); }},
      {"stop-without", [&] { return stop_in_order(c, 130); }},
      {"throw",
       [&] {
         return fail_on_rank_1(c, [] { throw fsdp::DataError("train.jsonl:7:\n  no known key"); });
       }},
      {"bad-alloc", [&] { return fail_on_rank_1(c, [] { throw std::bad_alloc(); }); }},
      {"segfault", [&] { return fail_on_rank_1(c, segfault); }},
      {"exit-3", [&] { return fail_on_rank_1(c, [] { std::_Exit(3); }); }},
      {"exit-0-early", [&] { return fail_on_rank_1(c, [] { std::_Exit(0); }); }},
      {"throw-in-thread",
       [&] {
         return fail_on_rank_1(
             c, [] { std::thread([] { throw std::runtime_error("boom in a thread"); }).join(); });
       }},
      {"hang-on-failure",
       [&] {
         std::signal(SIGTERM, SIG_IGN);
         c.barrier(make_tag("ready"));
         if (c.rank() == 1) throw fsdp::NumericsError("loss is NaN");
         for (;;) sleep_ms(1000);
         return 0;
       }},
  };
  return modes.at(mode)();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argv[argc - 1];
  if (argc == 4 && std::string(argv[1]) == "--launch" && !fsdp::comm::started_as_rank()) {
    return fsdp::comm::launch_local(std::atoi(argv[2]), {argv[0], mode}, {.name = "finetune"});
  }
  if (std::string(argv[1]) == "--launch-missing") {
    return fsdp::comm::launch_local(std::atoi(argv[2]), {"/nowhere/program"}, {.name = "finetune"});
  }
  const char* stops = std::getenv("FSDP_TEST_STOP_RANK");
  if (stops != nullptr && std::string(stops) == std::getenv("RANK")) std::raise(SIGSTOP);
  return fsdp::comm::run_rank([&](Communicator& c) { return dispatch(mode, c); },
                              {.name = "finetune"});
}
