// A rank of whatever world it is started in, for the tests of launchers and of gloo:
// world_program digest | work | compute-long
#include <chrono>
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/join.h"
#include "libfsdp/gloo/transport.h"
#include "tests/hosts/world_digest.h"

using fsdp::cat;
using fsdp::comm::Communicator;
using fsdp::comm::make_tag;

namespace {

void say(const std::string& text) {
  std::printf("%s\n", text.c_str());  // One write a line, however many ranks share a pipe.
  std::fflush(stdout);
}

int digest(Communicator& c) {
  char hex[20];
  std::snprintf(hex, sizeof(hex), "%016lx",
                static_cast<unsigned long>(fsdp::testing::world_digest(c)));
  say(cat("rank ", c.rank(), " of ", c.size(), " digest ", hex, ", ", c.ranks_per_host(),
          " ranks a host"));
  return 0;
}

/// A barrier every few milliseconds, for a minute.
int work(Communicator& c) {
  c.barrier(make_tag("ready"));
  say(cat("rank ", c.rank(), " works"));
  for (int step = 0; step < 12'000; ++step) {
    c.report_progress(step, "backward");
    c.barrier(make_tag("step", step));
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return 0;
}

/// Rank 1 computes for much longer than the peer time-out: no failure.
int compute_long(Communicator& c) {
  c.barrier(make_tag("ready"));
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(3500);
  while (c.rank() == 1 && std::chrono::steady_clock::now() < end) {
  }
  return digest(c);
}

}  // namespace

int main(int, char** argv) {
  const std::map<std::string, std::function<int(Communicator&)>> modes = {
      {"digest", digest}, {"work", work}, {"compute-long", compute_long}};
  return fsdp::comm::run_rank(modes.at(argv[1]),
                              {.join = {.transports = {fsdp::gloo::transport()}}, .name = "world"});
}
