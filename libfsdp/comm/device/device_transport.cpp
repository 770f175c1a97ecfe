// Not yet run on a GPU: see docs/status.md.
#include "libfsdp/comm/device/device_transport.h"

#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/device/cuda_ipc_communicator.h"
#include "libfsdp/comm/device/nccl_communicator.h"
#include "libfsdp/device/cuda_loader.h"

namespace fsdp::comm {
namespace {

/// What the ranks tell each other about their devices.
struct Place {
  std::array<char, 64> host{};
  std::array<char, device::kCudaCardBytes> card{};
  std::array<char, 128> problem{};
};

Place find_place(int local_rank, int& device) {
  Place place;
  gethostname(place.host.data(), place.host.size() - 1);
  const device::CudaStatus& cuda = device::cuda_status();
  if (!cuda.usable) {
    std::strncpy(place.problem.data(), cuda.reason.c_str(), place.problem.size() - 1);
    return place;
  }
  device = local_rank % cuda.num_devices;
  device::check_cuda(device::cuda_runtime().card_of(device, place.card.data()), "naming a GPU");
  return place;
}

bool same_card(const Place& a, const Place& b) {
  return std::strcmp(a.host.data(), b.host.data()) == 0 &&
         std::strcmp(a.card.data(), b.card.data()) == 0;
}

bool any_card_twice(const std::vector<Place>& places) {
  for (size_t a = 0; a < places.size(); ++a) {
    for (size_t b = a + 1; b < places.size(); ++b) {
      if (same_card(places[a], places[b])) return true;
    }
  }
  return false;
}

}  // namespace

bool is_device_transport(std::string_view name) { return name == "nccl" || name == "cuda_ipc"; }

bool host_has_gpu() {
  const char* library = std::getenv("FSDP_CUDA_LIBRARY");
  return (library != nullptr && *library != '\0') || access("/dev/nvidiactl", F_OK) == 0 ||
         access("/dev/dxg", F_OK) == 0;
}

std::unique_ptr<Communicator> on_device(std::unique_ptr<Communicator> host,
                                        const CommOptions& options, std::string_view name) {
  int device = 0;
  const Place mine = find_place(host->rank() % host->ranks_per_host(), device);
  std::vector<Place> places(static_cast<size_t>(host->size()));
  host->exchange(&mine, sizeof(mine), places.data(), make_tag("devices"));
  for (size_t rank = 0; rank < places.size(); ++rank) {
    if (places[rank].problem[0] != '\0') {
      throw ConfigError(
          cat("[comm] rank ", rank, " cannot use a GPU: ", places[rank].problem.data()));
    }
  }
  const bool shared = any_card_twice(places);
  if (name.empty()) name = shared ? "cuda_ipc" : "nccl";
  if (name == "nccl" && shared)
    throw ConfigError("[comm] nccl: two ranks have the same GPU. Hint: FSDP_COMM=cuda_ipc");
  if (name == "cuda_ipc" && host->ranks_per_host() != host->size())
    throw ConfigError("[comm] cuda_ipc: the ranks are on several hosts. Hint: one rank a GPU");
  std::shared_ptr<kernels::Compute> compute = kernels::make_cuda_compute(device);
  if (name == "nccl") return make_nccl(std::move(host), std::move(compute), options);
  return make_cuda_ipc(std::move(host), std::move(compute), options);
}

}  // namespace fsdp::comm
