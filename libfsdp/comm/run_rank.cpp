// How a rank ends: its failure is told before anything is torn down.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/control/report.h"
#include "libfsdp/comm/join.h"

namespace fsdp::comm {
namespace {

/// The rank's way to tell of its failure. One a process, because a process can end only once.
struct Ending {
  std::string name;
  RankPlace place;
  int launcher = -1;  // Socket, -1 = nobody there.
  std::atomic<Communicator*> communicator{nullptr};
  std::once_flag told;
};
std::atomic<Ending*> current_ending{nullptr};

FailureReport failure(ExitCode code, std::string text) {
  return {.code = static_cast<int>(code), .text = std::move(text)};
}

// Given back when memory is exhausted, so that the failure can still be told.
std::atomic<char*> memory_reserve{nullptr};
constexpr size_t kReserveBytes = 256 << 10;

FailureReport report_of(const std::exception_ptr& thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
    return failure(ExitCode::kInternal, "std::terminate without an exception");
  } catch (const CommError& e) {
    FailureReport report = failure(e.code(), e.what());
    report.consequence = true;
    return report;
  } catch (const Error& e) {
    return failure(e.code(), e.what());
  } catch (const std::bad_alloc&) {
    std::free(memory_reserve.exchange(nullptr));
    return failure(ExitCode::kHostResource, "out of host memory");
  } catch (const std::exception& e) {
    return failure(ExitCode::kInternal, e.what());
  } catch (...) {
    return failure(ExitCode::kInternal, "an exception that is no std::exception");
  }
}

void tell(Ending& ending, const FailureReport& report) {
  if (ending.launcher < 0 || !send_report(ending.launcher, report)) {
    const bool alone = ending.place.size == 1;
    std::fflush(stdout);
    std::fprintf(stderr, "%s: %s%s\n", ending.name.c_str(),
                 alone ? "" : cat("rank ", ending.place.rank, ": ").c_str(), report.text.c_str());
  }
  if (Communicator* communicator = ending.communicator.load()) communicator->abort(report.text);
}

[[noreturn]] void end_now(int code) {
  std::fflush(nullptr);
  _exit(code);
}

[[noreturn]] void on_terminate() {
  Ending* ending = current_ending.load();
  if (ending == nullptr) std::abort();
  FailureReport report = report_of(std::current_exception());
  report.text += " (thrown where nobody catches it)";
  std::call_once(ending->told, [&] { tell(*ending, report); });
  end_now(report.code);
}

int launcher_socket() {
  const char* text = std::getenv("FSDP_LAUNCH_FD");
  if (text == nullptr) return -1;
  const int fd = std::atoi(text);
  return fcntl(fd, F_GETFD) < 0 ? -1 : fd;
}

int run(Ending& ending, const std::function<int(Communicator&)>& fn, const RankOptions& options) {
  try {
    ending.place = place_from_environment();
    const std::unique_ptr<Communicator> communicator = join(options.join);
    ending.communicator = communicator.get();
    int code = 0;
    try {
      code = fn(*communicator);
    } catch (...) {
      const FailureReport report = report_of(std::current_exception());
      std::call_once(ending.told, [&] { tell(ending, report); });
      // Nothing of this process may wait for a peer now, and destructors might.
      if (ending.place.size > 1) end_now(report.code);
      code = report.code;
    }
    ending.communicator = nullptr;
    return code;
  } catch (...) {
    const FailureReport report = report_of(std::current_exception());
    std::call_once(ending.told, [&] { tell(ending, report); });
    if (ending.place.size > 1) end_now(report.code);
    return report.code;
  }
}

}  // namespace

int run_rank(const std::function<int(Communicator&)>& fn, const RankOptions& options) {
  Ending ending;
  ending.name = options.name;
  ending.launcher = launcher_socket();
  memory_reserve = static_cast<char*>(std::malloc(kReserveBytes));
  current_ending = &ending;
  const std::terminate_handler before = std::set_terminate(on_terminate);
  const int code = run(ending, fn, options);
  std::set_terminate(before);
  current_ending = nullptr;
  std::free(memory_reserve.exchange(nullptr));
  return code;
}

}  // namespace fsdp::comm
