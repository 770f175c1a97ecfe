#include "libfsdp/trainer/ranks.h"

#include <ATen/Parallel.h>

#include <cstdlib>
#include <filesystem>
#include <memory>

#include "libfsdp/base/error.h"
#include "libfsdp/base/log.h"
#include "libfsdp/comm/join.h"
#include "libfsdp/comm/launch/launcher.h"
#include "libfsdp/gloo/transport.h"
#include "libfsdp/models/fast_matmul.h"
#include "libfsdp/models/tensor_memory.h"
#include "libfsdp/trainer/signals.h"

namespace fsdp::trainer {
namespace {

bool started_as_rank() {
  return std::getenv("FSDP_LAUNCH_FD") != nullptr || comm::place_from_environment().size > 1;
}

/// Calls `body`; a foreign exception becomes one of ours with its first line (LibTorch appends a
/// stack trace).
void call_translated(const std::function<void(comm::Communicator&)>& body,
                     comm::Communicator& communicator) {
  try {
    body(communicator);
  } catch (const Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw HostResourceError("out of host memory.");
  } catch (const std::filesystem::filesystem_error& error) {
    throw HostResourceError(error.what());
  } catch (const std::exception& error) {
    const std::string text = error.what();
    if (text.find("DefaultCPUAllocator") != std::string::npos)
      throw HostResourceError("out of host memory.");
    throw InternalError("internal error: " + text.substr(0, text.find('\n')));
  }
}

comm::CommOptions comm_options(const RankOptions& options) {
  auto comm = comm::comm_options_from_environment();
  comm.peer_timeout_s = options.peer_timeout.value_or(comm.peer_timeout_s);
  comm.timeout_s = options.ddp_timeout.value_or(comm.timeout_s);
  return comm;
}

int run_as_rank(const RankOptions& options, const std::function<void(comm::Communicator&)>& body) {
  if (options.deterministic && std::getenv("OMP_NUM_THREADS") == nullptr) at::set_num_threads(1);
  models::use_fast_float32_matmul();
  models::use_tensor_heap();
  const auto whole = [&](comm::Communicator& communicator) {
    if (communicator.size() > 1) log::set_rank(communicator.rank());
    call_translated(body, communicator);
    return 0;
  };
  return comm::run_rank(whole,
                        {.join = {.comm = comm_options(options), .transports = {gloo::transport()}},
                         .name = "finetune"});
}

/// argv with a path that still works when argv[0] was found through PATH.
std::vector<std::string> with_program_path(std::vector<std::string> argv) {
  std::error_code problem;
  const auto path = std::filesystem::read_symlink("/proc/self/exe", problem);
  if (!problem) argv.front() = path.string();
  return argv;
}

}  // namespace

int run_on_ranks(const RankOptions& options, const std::vector<std::string>& argv,
                 const std::function<void()>& check,
                 const std::function<void(comm::Communicator&)>& body) {
  const bool is_rank = started_as_rank();
  handle_signals(is_rank                       ? SignalRole::kRank
                 : options.nproc_per_node == 1 ? SignalRole::kAlone
                                               : SignalRole::kLauncher);
  if (is_rank) {
    const auto size = comm::place_from_environment().size;
    if (std::getenv("FSDP_LAUNCH_FD") == nullptr && options.nproc_per_node > 1 &&
        options.nproc_per_node != size) {
      throw ConfigError(cat("[options] --nproc_per_node ", options.nproc_per_node,
                            ", but this process is one of ", size,
                            " ranks that another launcher started. Hint: leave the option out."));
    }
    return run_as_rank(options, body);
  }
  check();
  if (options.nproc_per_node == 1) return run_as_rank(options, body);
  if (options.deterministic) ::setenv("OMP_NUM_THREADS", "1", 0);
  return comm::launch_local(static_cast<int>(options.nproc_per_node), with_program_path(argv),
                            {.name = "finetune", .comm = comm_options(options)});
}

}  // namespace fsdp::trainer
