// What the transports between devices have in common. Each wraps a communicator of the host,
// through which small data goes and which tells of lost ranks.
//
// Note [Streams] The model computes on the stream of compute(); data between ranks moves on one
// more, with priority. begin makes that one wait for what the compute stream holds so far, finish
// and wait_released make the compute stream wait for it. So the caller never waits for the device,
// and its order of calls is the order of the data, as on the host.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/options.h"
#include "libfsdp/device/cuda_objects.h"
#include "libfsdp/kernels/compute.h"

namespace fsdp::comm {

class DeviceCommunicator : public Communicator {
 public:
  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  int ranks_per_host() const override { return host_->ranks_per_host(); }
  kernels::Compute& compute() override { return *compute_; }
  /// Each device has a copy of its own.
  bool can_share(const Group&) const override { return false; }
  std::shared_ptr<SharedMemory> allocate_shared(const Group& group, size_t bytes,
                                                std::string_view label) override;
  void exchange(const void* mine, size_t bytes, void* all, Tag tag) override {
    host_->exchange(mine, bytes, all, tag);
  }
  void broadcast(void* data, size_t bytes, int root, Tag tag) override {
    host_->broadcast(data, bytes, root, tag);
  }
  void barrier(Tag tag) override { host_->barrier(tag); }
  void abort(std::string_view reason) noexcept override { host_->abort(reason); }
  std::string failure() override { return host_->failure(); }
  void report_progress(int64_t step, std::string_view phase) override {
    host_->report_progress(step, phase);
  }
  void report_unit(int32_t unit) override { host_->report_unit(unit); }
  void name_units(std::span<const std::string> names) override;

 protected:
  DeviceCommunicator(std::unique_ptr<Communicator> host, std::shared_ptr<kernels::Compute> compute,
                     const CommOptions& options);

  Communicator& host() const { return *host_; }
  const CommOptions& options() const { return options_; }
  const device::CudaStream& stream() const { return stream_; }
  std::string_view unit_name(int32_t unit) const;
  /// "gather of unit 'layers.3' at step 7 (...)".
  std::string named(const Tag& tag) const { return describe(tag, unit_name(tag.unit)); }
  /// Runs `work`; throws DeviceMemoryError on every rank alike when one rank's threw one, CommError
  /// when ranks differ over size or label. Collective over the world.
  void agree_on_memory(const std::function<void()>& work, size_t bytes, std::string_view label);
  /// destination (+)= sources in their order, on the communication stream.
  void fold_on_stream(float* destination, std::span<const void* const> sources, DType dtype,
                      int64_t n, bool accumulate);

 private:
  std::unique_ptr<Communicator> host_;
  std::shared_ptr<kernels::Compute> compute_;
  CommOptions options_;
  device::CudaStream stream_{device::CudaStream::Priority::kHigh};
  std::vector<std::string> unit_names_;
  uint64_t allocations_ = 0;
};

}  // namespace fsdp::comm
