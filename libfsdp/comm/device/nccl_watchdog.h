// The collectives that are under way on a device, and a thread that ends those which never will.
#pragma once

#include <array>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/device/nccl_groups.h"
#include "libfsdp/device/cuda_objects.h"

namespace fsdp::comm {

constexpr uint64_t kNcclFlights = 64;  // Collectives that may be under way.

/// A collective that has begun.
struct NcclFlight {
  uint64_t sequence = 0;
  Tag tag;
  std::shared_ptr<void> keep;  ///< Memory that it uses.
  device::CudaEvent ready;     ///< The device has come to it.
  device::CudaEvent done;
};

/// Thread safety: at, start and begun are called by the communicator's thread.
class NcclWatchdog {
 public:
  using GiveUp = std::function<void(const Tag& tag, const std::string& why)>;

  /// `give_up` is called from the thread, once, when a collective that the device has come to does
  /// not end within `timeout_s`, or within half a second and `host` knows of a failure (an absent
  /// rank: NCCL itself waits for it for ever), or NCCL reports an error.
  /// The thread uses `device` (-1 = a stand-in's).
  NcclWatchdog(NcclGroups& groups, Communicator& host, int device, double timeout_s,
               GiveUp give_up);
  ~NcclWatchdog() { stop(); }
  void stop();

  const NcclFlight& at(uint64_t sequence) const { return flights_[sequence % kNcclFlights]; }
  /// A new flight in the place of one that is done.
  const NcclFlight& start(uint64_t sequence, const Tag& tag, std::shared_ptr<void> keep);
  /// Its events have been recorded.
  void begun(uint64_t sequence);

  /// What a poll of the device waits between two looks.
  static void rest();

 private:
  void run();

  NcclGroups& groups_;
  Communicator& host_;
  int device_;
  double timeout_s_;
  GiveUp give_up_;
  std::array<NcclFlight, kNcclFlights> flights_;
  std::mutex mutex_;
  std::condition_variable stopped_;
  bool stop_ = false;
  uint64_t begun_ = 0;
  uint64_t done_ = 0;
  double waited_s_ = 0;  // For the oldest flight, since the device has come to it.
  std::thread thread_;
};

}  // namespace fsdp::comm
