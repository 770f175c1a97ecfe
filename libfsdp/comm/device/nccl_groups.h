// NCCL's communicators: one for each group of ranks that has a collective.
#pragma once

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/comm/device/nccl_table.h"
#include "libfsdp/comm/options.h"

namespace fsdp::comm {

/// One communicator of NCCL, and the memory that it knows.
struct NcclGroup {
  struct Known {
    const void* memory = nullptr;
    void* handle = nullptr;
    bool is_window = false;
  };
  Group members;
  void* comm = nullptr;  ///< Null for a group of one rank, and after an abort.
  std::vector<Known> known;
};

/// All of a rank's. abort_all() and failure() may be called from any thread.
class NcclGroups {
 public:
  NcclGroups(Communicator& host, const CommOptions& options);
  /// Ends the communicators in an orderly way, unless they were aborted.
  ~NcclGroups();

  /// The communicator of `group`. Collective over the world at a group's first use: there every
  /// rank uses some group for the first time.
  NcclGroup& of(const Group& group);
  /// Makes memory of NCCL known to `group`, once. Collective over the group. Where NCCL cannot, the
  /// memory is used as it is.
  void make_known(NcclGroup& group, void* memory, size_t bytes);
  /// Before `memory` is freed.
  void forget(void* memory);

  /// Runs `call`, an NCCL function on `group`, and waits until it has been enqueued; throws
  /// CommError.
  template <class Call>
  void run(NcclGroup& group, const char* what, Call call) {
    int code = kNcclSuccess;
    {
      const std::lock_guard lock(mutex_);
      throw_if_aborted();
      code = call(group.comm);
    }
    settle(group, code, what);
  }

  /// What NCCL says has gone wrong since, or empty.
  std::string failure();
  void abort_all() noexcept;
  bool aborted() const { return aborted_.load(); }

 private:
  void settle(NcclGroup& group, int code, const char* what);
  void make_comm(NcclGroup& group);
  void throw_if_aborted() const;
  std::string text_of(const char* what, int code, void* comm) const;

  Communicator& host_;
  const NcclTable& table_;
  CommOptions options_;
  std::list<NcclGroup> groups_;
  std::mutex mutex_;  // Of calls of NCCL against an abort, and of groups_.
  std::atomic<bool> aborted_ = false;
};

}  // namespace fsdp::comm
