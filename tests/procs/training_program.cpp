// A training run in which one rank fails: training_program MODEL DATA OUTPUT RANKS STEPS.
//
// FSDP_TEST_FAULT="rank=1 place=backward step=3 kind=kill after_us=200" says who, where and how;
// places are those of FaultyCommunicator, and "rendezvous": before the process joins. The moment is
// appended to the file FSDP_TEST_FAULT_LOG as "fault PID NANOSECONDS" of the monotonic clock.
// Driven by benchmarks/failure_trials/trials.py.
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <span>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/join.h"
#include "libfsdp/device/host_allocator.h"
#include "libfsdp/trainer/options.h"
#include "libfsdp/trainer/ranks.h"
#include "libfsdp/trainer/train.h"
#include "tests/support/faulty_communicator.h"

namespace {

using fsdp::cat;
using fsdp::testing::FaultyCommunicator;

struct Fault {
  int rank = -1;
  std::string place, kind;
  int64_t step = -1;     // -1 = any.
  int64_t after_us = 0;  // After the place was reached; 0 = right there, in the calling thread.
};

Fault fault_from_environment() {
  const char* text = std::getenv("FSDP_TEST_FAULT");
  std::istringstream words(text == nullptr ? "" : text);
  Fault fault;
  for (std::string word; words >> word;) {
    const std::string value = word.substr(word.find('=') + 1);
    if (word.starts_with("rank=")) fault.rank = std::stoi(value);
    if (word.starts_with("place=")) fault.place = value;
    if (word.starts_with("kind=")) fault.kind = value;
    if (word.starts_with("step=")) fault.step = std::stoll(value);
    if (word.starts_with("after_us=")) fault.after_us = std::stoll(value);
  }
  std::replace(fault.place.begin(), fault.place.end(), '-', ' ');
  return fault;
}

void note_moment() {
  const char* path = std::getenv("FSDP_TEST_FAULT_LOG");
  if (path == nullptr) return;
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  char line[80];
  const int length =
      std::snprintf(line, sizeof(line), "fault %d %lld\n", getpid(),
                    static_cast<long long>(now.tv_sec) * 1'000'000'000 + now.tv_nsec);
  const int file = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  [[maybe_unused]] const auto written = write(file, line, static_cast<size_t>(length));
  close(file);
}

char* volatile taken = nullptr;  // Volatile: else the compiler takes nothing at all.

/// Takes memory until there is none, to the last small piece.
void exhaust_memory() {
  rlimit limit{};
  getrlimit(RLIMIT_AS, &limit);
  std::FILE* statm = std::fopen("/proc/self/statm", "r");
  unsigned long pages = 0;
  if (std::fscanf(statm, "%lu", &pages) != 1) std::abort();
  std::fclose(statm);
  limit.rlim_cur = pages * static_cast<unsigned long>(getpagesize()) + (32UL << 20);
  setrlimit(RLIMIT_AS, &limit);
  for (size_t bytes = 16 << 20;; bytes = bytes > 64 ? bytes / 2 : bytes) {
    try {
      for (;;) taken = new char[bytes];
    } catch (const std::bad_alloc&) {
      if (bytes <= 64) throw;
    }
  }
}

struct ExitsInDestructor {
  ~ExitsInDestructor() { std::exit(0); }
};
struct ThrowsInDestructor {
  ~ThrowsInDestructor() noexcept(false) { throw std::runtime_error("thrown by a destructor"); }
};

void fail(const std::string& kind) {
  note_moment();
  const std::map<std::string, int> signals = {
      {"kill", SIGKILL}, {"term", SIGTERM}, {"segv", SIGSEGV}, {"bus", SIGBUS}, {"abrt", SIGABRT},
      {"int", SIGINT},   {"stop", SIGSTOP}, {"fpe", SIGFPE},   {"hup", SIGHUP}, {"pause", SIGSTOP}};
  if (const auto found = signals.find(kind); found != signals.end()) {
    kill(getpid(), found->second);
    return;
  }
  if (kind == "launcher-kill") kill(getppid(), SIGKILL);
  if (kind == "launcher-kill") return;
  if (kind == "throw") throw std::runtime_error("boom");
  if (kind == "throw-data") throw fsdp::DataError("train.jsonl:7: no known key");
  if (kind == "throw-int") throw 42;
  if (kind == "bad-alloc") exhaust_memory();
  if (kind == "exit-0") std::exit(0);
  if (kind == "quick-exit-0") _exit(0);
  if (kind == "exit-3") std::exit(3);
  if (kind == "abort") std::abort();
  if (kind == "throw-in-thread") std::thread([] { throw std::runtime_error("boom"); }).join();
  if (kind == "throw-in-destructor") ThrowsInDestructor();
  if (kind == "exit-in-destructor") {
    const ExitsInDestructor ends;
    throw std::runtime_error("unwinds");
  }
  if (kind == "spin") {
    for (volatile bool forever = true; forever;) {
    }
  }
  throw std::runtime_error(cat("unknown kind of fault '", kind, "'"));
}

/// Fails once, when the place and the step are reached.
class Trap {
 public:
  Trap(Fault fault, int rank) : fault_(std::move(fault)), rank_(rank) {}
  void at(const std::string& place, int64_t step) {
    if (sprung_ || fault_.rank < 0) return;
    if (fault_.step >= 0 && step != fault_.step) return;
    if (rank_ != fault_.rank) return hold_back(place);
    if (place != fault_.place) return;
    sprung_ = true;
    if (fault_.after_us == 0) return fail(fault_.kind);
    std::thread([fault = fault_] {
      std::this_thread::sleep_for(std::chrono::microseconds(fault.after_us));
      fail(fault.kind);
    }).detach();
  }

 private:
  /// The others come late to what the failing rank waits for.
  void hold_back(const std::string& place) {
    const bool late = (fault_.place == "reduce wait" && place == "reduce") ||
                      (fault_.place == "packet" && place == "packet");
    if (!late || fault_.after_us == 0) return;
    sprung_ = true;
    const char* log = std::getenv("FSDP_TEST_FAULT_LOG");
    for (int i = 0; i < 2500 && log != nullptr && access(log, F_OK) != 0; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }

  Fault fault_;
  int rank_;
  bool sprung_ = false;
};

/// Three elements of one rank's gradient become NaN (kind=nan): the parameters must stay as they
/// are on every rank.
class NanTrial {
 public:
  NanTrial(const Fault& fault, FaultyCommunicator& comm) : fault_(fault), comm_(comm) {}

  void at(const std::string& place, int64_t step) {
    if (fault_.kind != "nan" || step != fault_.step) return;
    if (place == "packet") before_ = parameters();
    if (place != "reduce" || comm_.rank() != fault_.rank || poisoned_) return;
    poisoned_ = true;
    const std::span<std::byte> gradient = comm_.last_source();
    std::fill_n(reinterpret_cast<float*>(gradient.data()), 3, std::nanf(""));
  }

  /// Runs the training; says on stdout whether the update was left out.
  void run(const std::function<void()>& train) const {
    try {
      train();
    } catch (const fsdp::NumericsError&) {
      const std::vector<std::byte> after = parameters();
      const bool same = !after.empty() && after == before_;
      std::printf("rank %d: %zu bytes of parameters %s\n", comm_.rank(), after.size(),
                  same ? "unchanged" : "CHANGED");
      std::fflush(stdout);
      comm_.maximum(0, "ranks that have said so");  // The first rank that ends ends the others.
      throw;
    }
  }

 private:
  std::vector<std::byte> parameters() const {
    std::vector<std::byte> all;
    for (const auto& memory : comm_.memory()) {
      if (memory.label.find("parameter") != std::string::npos)
        all.insert(all.end(), memory.data, memory.data + memory.bytes);
    }
    return all;
  }

  const Fault& fault_;
  FaultyCommunicator& comm_;
  std::vector<std::byte> before_;
  bool poisoned_ = false;
};

fsdp::trainer::TrainOptions options_of(char** argv) {
  fsdp::trainer::TrainOptions options;
  options.model_name_or_path = argv[1];
  options.train_file = argv[2];
  options.output_dir = argv[3];
  options.overwrite_output_dir = true;
  options.ranks.nproc_per_node = std::atoi(argv[4]);
  options.max_steps = std::atoi(argv[5]);
  options.sequence.max_seq_length = 64;
  options.per_device_train_batch_size = 2;
  options.logging_steps = 1;
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  fsdp::device::tune_host_allocator();
  const auto options = options_of(argv);
  const Fault fault = fault_from_environment();
  try {
    if (fsdp::comm::started_as_rank() && fault.place == "rendezvous" &&
        fsdp::comm::place_from_environment().rank == fault.rank) {
      std::this_thread::sleep_for(std::chrono::microseconds(fault.after_us));
      fail(fault.kind);
    }
    int code = 0;  // Of this process, when it is a rank.
    const int failure = fsdp::trainer::run_on_ranks(
        options.ranks, {argv, argv + argc}, [&] { fsdp::trainer::check_train(options); },
        [&](fsdp::comm::Communicator& comm) {
          Trap trap(fault, comm.rank());
          NanTrial* nan = nullptr;
          FaultyCommunicator faulty(comm, [&](const std::string& place, int64_t step) {
            nan->at(place, step);
            if (fault.kind != "nan") trap.at(place, step);
          });
          NanTrial nan_trial(fault, faulty);
          nan = &nan_trial;
          nan_trial.run([&] { code = fsdp::trainer::run_train(options, "{}", faulty); });
        });
    return failure != 0 ? failure : code;
  } catch (const fsdp::Error& error) {
    std::fprintf(stderr, "finetune: %s\n", error.what());
    return static_cast<int>(error.code());
  }
}
