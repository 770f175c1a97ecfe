#include "tests/hosts/worlds.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/os/tcp_socket.h"
#include "tests/hosts/world_digest.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {

int free_port() {
  for (;;) {
    const comm::FileDescriptor first = comm::listen_tcp("127.0.0.1", 0);
    const int port = comm::local_port(first.get());
    try {
      comm::listen_tcp("127.0.0.1", port + 1);
      return port;
    } catch (const CommError&) {
    }
  }
}

std::vector<ChildProgram> start_hosts(int world, const std::string& mode,
                                      std::vector<std::string> environment) {
  environment.push_back("MASTER_ADDR=127.0.0.1");
  environment.push_back(cat("MASTER_PORT=", free_port()));
  environment.push_back("FSDP_RENDEZVOUS_TOKEN=a secret of this test");
  environment.push_back(cat("WORLD_SIZE=", world));
  environment.push_back("LOCAL_WORLD_SIZE=1");
  environment.push_back("LOCAL_RANK=0");
  std::vector<ChildProgram> hosts;
  for (int rank = 0; rank < world; ++rank) {
    std::vector<std::string> own = environment;
    own.push_back(cat("RANK=", rank));
    hosts.emplace_back(std::vector<std::string>{FSDP_WORLD_PROGRAM, mode}, own);
  }
  return hosts;
}

std::string digest_of_threads(int world) {
  uint64_t value = 0;
  const std::string errors = run_ranks_quietly(world, [&](comm::Communicator& c) {
    const uint64_t mine = world_digest(c);
    if (c.rank() == 0) value = mine;
  });
  if (!errors.empty()) throw std::runtime_error(errors);
  char hex[20];
  std::snprintf(hex, sizeof(hex), "%016lx", static_cast<unsigned long>(value));
  return hex;
}

std::vector<std::string> digest_lines(int world) {
  std::vector<std::string> lines;
  const std::string digest = digest_of_threads(world);
  for (int rank = 0; rank < world; ++rank)
    lines.push_back(cat("rank ", rank, " of ", world, " digest ", digest));
  return lines;
}

bool wait_for_text(ChildProgram& child, const std::string& text, double timeout_s) {
  for (const double end = seconds_now() + timeout_s; seconds_now() < end;) {
    const bool ended = child.wait(0).has_value();
    if (child.output().find(text) != std::string::npos) return true;
    if (ended) return false;
    usleep(5000);
  }
  return false;
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool is_long() {
  const char* scale = std::getenv("FSDP_TEST_SCALE");
  return scale != nullptr && std::string(scale) == "long";
}

}  // namespace fsdp::testing
