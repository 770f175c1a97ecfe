// Not yet run on a GPU: see docs/status.md.
#include "libfsdp/comm/device/nccl_watchdog.h"

#include <chrono>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/os/quiet_thread.h"
#include "libfsdp/device/cuda_loader.h"

namespace fsdp::comm {
namespace {

constexpr std::chrono::milliseconds kInterval{100};
// A rank may leave, or be seen to have failed, while what it began still ends well.
constexpr double kPatienceSeconds = 0.5;

}  // namespace

NcclWatchdog::NcclWatchdog(NcclGroups& groups, Communicator& host, int device, double timeout_s,
                           GiveUp give_up)
    : groups_(groups),
      host_(host),
      device_(device),
      timeout_s_(timeout_s),
      give_up_(std::move(give_up)) {
  thread_ = start_quiet_thread([this] { run(); });
}

void NcclWatchdog::stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  stopped_.notify_all();
  if (thread_.joinable()) thread_.join();
}

const NcclFlight& NcclWatchdog::start(uint64_t sequence, const Tag& tag,
                                      std::shared_ptr<void> keep) {
  NcclFlight& flight = flights_[sequence % kNcclFlights];
  std::shared_ptr<void> before;  // Freed outside of the lock: that may wait for the device.
  const std::lock_guard lock(mutex_);
  before = std::exchange(flight.keep, std::move(keep));
  flight.sequence = sequence;
  flight.tag = tag;
  return flight;
}

void NcclWatchdog::begun(uint64_t sequence) {
  const std::lock_guard lock(mutex_);
  begun_ = sequence;
}

void NcclWatchdog::rest() { std::this_thread::sleep_for(std::chrono::microseconds(50)); }

void NcclWatchdog::run() {
  // Else this thread would make a context of its own on the first device.
  if (device_ >= 0) device::cuda_runtime().set_device(device_);
  std::unique_lock lock(mutex_);
  while (!stopped_.wait_for(lock, kInterval, [this] { return stop_; })) {
    Tag tag;
    std::string why;
    try {
      while (done_ < begun_ && at(done_ + 1).done.done()) {
        ++done_;
        waited_s_ = 0;
      }
      if (done_ < begun_) {
        tag = at(done_ + 1).tag;
        if (at(done_ + 1).ready.done())
          waited_s_ += std::chrono::duration<double>(kInterval).count();
        if (waited_s_ > kPatienceSeconds) why = host_.failure();
        if (why.empty() && waited_s_ > timeout_s_) {
          why = cat("waited for ", timeout_s_,
                    " s on the device (a rank has not come, or began another collective)");
        }
      }
      if (why.empty()) why = groups_.failure();
    } catch (const std::exception& e) {
      why = e.what();  // The device has failed: nothing will come from it.
    }
    if (why.empty()) continue;
    lock.unlock();  // give_up ends what the other thread may be waiting for.
    give_up_(tag, why);
    return;
  }
}

}  // namespace fsdp::comm
