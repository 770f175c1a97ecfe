// Not yet run on a GPU: see docs/status.md.
#include "libfsdp/comm/device/device_communicator.h"

#include <array>
#include <cstring>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/agreement.h"
#include "libfsdp/device/cuda_loader.h"
#include "libfsdp/kernels/fold_type.h"

namespace fsdp::comm {

DeviceCommunicator::DeviceCommunicator(std::unique_ptr<Communicator> host,
                                       std::shared_ptr<kernels::Compute> compute,
                                       const CommOptions& options)
    : host_(std::move(host)), compute_(std::move(compute)), options_(options) {
  world_ = host_->world();
}

std::shared_ptr<SharedMemory> DeviceCommunicator::allocate_shared(const Group&, size_t,
                                                                  std::string_view) {
  throw InternalError("internal error: devices do not share memory");
}

void DeviceCommunicator::name_units(std::span<const std::string> names) {
  unit_names_.assign(names.begin(), names.end());
  host_->name_units(names);
}

std::string_view DeviceCommunicator::unit_name(int32_t unit) const {
  const auto index = static_cast<size_t>(unit);
  return unit >= 0 && index < unit_names_.size() ? std::string_view(unit_names_[index]) : "";
}

void DeviceCommunicator::agree_on_memory(const std::function<void()>& work, size_t bytes,
                                         std::string_view label) {
  struct Answer {
    Posted posted;
    std::array<char, 200> error{};
  };
  Answer mine;
  mine.posted = {.sequence = ++allocations_, .group = group_key(world()), .tag = make_tag(label)};
  mine.posted.tag.kind = CollectiveKind::kAllocate;
  mine.posted.tag.bytes = static_cast<int64_t>(bytes);
  try {
    work();
  } catch (const DeviceMemoryError& e) {
    std::strncpy(mine.error.data(), e.what(), mine.error.size() - 1);
  }
  std::vector<Answer> all(static_cast<size_t>(size()));
  host_->exchange(&mine, sizeof(mine), all.data(), make_tag(label));
  std::string failed;
  for (int rank = 0; rank < size(); ++rank) {
    const Answer& answer = all[static_cast<size_t>(rank)];
    const std::string text = difference(this->rank(), mine.posted, rank, answer.posted);
    if (!text.empty()) {
      abort(text);
      throw CommError(text);
    }
    if (answer.error[0] != '\0') failed += cat("\n  rank ", rank, ": ", answer.error.data());
  }
  if (failed.empty()) return;
  throw DeviceMemoryError(cat("[comm] no device memory for '", label, "', ", bytes,
                              " bytes on each of ", size(), " ranks:", failed,
                              "\n  Hint: more ranks, fewer kept units or shorter sequences need "
                              "less."));
}

void DeviceCommunicator::fold_on_stream(float* destination, std::span<const void* const> sources,
                                        DType dtype, int64_t n, bool accumulate) {
  device::check_cuda(kernels::cuda_kernels().fold_ranks(
                         destination, sources.data(), static_cast<int>(sources.size()),
                         kernels::fold_type(dtype), n, accumulate ? 1 : 0, stream_.get()),
                     "adding gradients of ranks");
}

}  // namespace fsdp::comm
