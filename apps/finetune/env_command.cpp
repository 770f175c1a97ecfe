// finetune env: what this program was built with and what this machine offers, for bug reports.
#include <ATen/Parallel.h>
#include <sched.h>
#include <sys/utsname.h>
#include <torch/headeronly/version.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>

#include "apps/finetune/program.h"
#include "libfsdp/base/error.h"
#include "libfsdp/device/cuda_loader.h"
#include "libfsdp/io/json.h"
#include "libfsdp/trainer/options.h"

namespace fsdp::app {
namespace {

using trainer::EnvOptions;

int64_t usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set)
                                                      : sysconf(_SC_NPROCESSORS_ONLN);
}

std::string first_value(const char* path, std::string_view key) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    const auto colon = line.find(':');
    if (colon == std::string::npos || line.compare(0, key.size(), key) != 0) continue;
    return line.substr(std::min(line.find_first_not_of(" \t", colon + 1), line.size()));
  }
  return "unknown";
}

std::string memory_limit() {
  std::ifstream in("/sys/fs/cgroup/memory.max");
  std::string text;
  in >> text;
  return text.empty() || text == "max" ? "none" : text + " bytes";
}

std::string kernel() {
  utsname name{};
  return uname(&name) == 0 ? cat(name.sysname, " ", name.release, " ", name.machine) : "unknown";
}

std::string cuda_text() {
  const auto& status = device::cuda_status();
  return status.usable ? cat(status.num_devices, " devices") : cat("no (", status.reason, ")");
}

io::Json facts() {
  return io::Json::object({{"finetune", FSDP_VERSION},
                           {"libtorch", TORCH_VERSION},
                           {"compiler", __VERSION__},
                           {"system", kernel()},
                           {"cpu", first_value("/proc/cpuinfo", "model name")},
                           {"cores", usable_cores()},
                           {"threads", at::get_num_threads()},
                           {"memory_total", first_value("/proc/meminfo", "MemTotal")},
                           {"memory_available", first_value("/proc/meminfo", "MemAvailable")},
                           {"memory_limit", memory_limit()},
                           {"cuda", cuda_text()},
                           {"transports", "shm between processes of this machine"}});
}

int run(const Invocation& call) {
  const auto options = load_checked<EnvOptions>(call);
  const auto json = facts();
  if (options.json) {
    std::printf("%s\n", json.dump(2).c_str());
    return 0;
  }
  for (const auto& [name, value] : json.items()) {
    std::printf("%-17s %s\n", name.c_str(),
                value.is_string() ? value.as_string().c_str() : value.dump().c_str());
  }
  return 0;
}

}  // namespace

const Command kEnvCommand = {"env", "Shows versions, cores, memory and devices.",
                             default_fields<EnvOptions>, run};

}  // namespace fsdp::app
