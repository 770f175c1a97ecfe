// Not yet run on a GPU: see docs/status.md.
#include "libfsdp/comm/device/nccl_groups.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <thread>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/device/cuda_loader.h"

namespace fsdp::comm {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::microseconds kPoll{50};
constexpr double kSpinSeconds = 200e-6;  // Enqueueing takes less; joining takes longer.

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

const NcclTable& nccl() {
  using GetTable = const NcclTable* (*)();
  static const NcclTable* const table =
      reinterpret_cast<GetTable>(device::cuda_symbol(kNcclTableSymbol))();
  check(table->version == kNcclTableVersion, "libfsdp_cuda.so has NCCL of another version");
  return *table;
}

NcclGroups::NcclGroups(Communicator& host, const CommOptions& options)
    : host_(host), table_(nccl()), options_(options) {}

NcclGroups::~NcclGroups() {
  if (aborted()) return;
  for (NcclGroup& group : groups_) {
    if (group.comm == nullptr) continue;
    // Its peers may be gone: what does not end in time is aborted.
    int state = table_.finalize(group.comm);
    for (const auto begin = Clock::now();
         state == kNcclInProgress && seconds_since(begin) < options_.peer_timeout_s;) {
      std::this_thread::sleep_for(kPoll);
      if (table_.async_error(group.comm, &state) != kNcclSuccess) break;
    }
    if (state == kNcclSuccess) {
      table_.destroy(group.comm);
    } else {
      table_.abort(group.comm);
    }
  }
}

NcclGroup& NcclGroups::of(const Group& members) {
  for (NcclGroup& group : groups_) {
    if (group.members == members) return group;
  }
  NcclGroup* made = nullptr;
  {
    const std::lock_guard lock(mutex_);
    groups_.push_back({.members = members});
    made = &groups_.back();
  }
  make_comm(*made);
  return *made;
}

void NcclGroups::make_comm(NcclGroup& group) {
  using Id = std::array<std::byte, kNcclIdBytes>;
  Id mine{};
  const bool several = group.members.size() > 1;
  if (several && group.members.front() == host_.rank()) {
    const int code = table_.make_id(mine.data());
    if (code != kNcclSuccess) throw CommError(text_of("making an id", code, nullptr));
  }
  std::vector<Id> all(static_cast<size_t>(host_.size()));
  host_.exchange(mine.data(), mine.size(), all.data(), make_tag("NCCL id"));
  if (!several) return;
  const auto place = std::lower_bound(group.members.begin(), group.members.end(), host_.rank());
  const Id& id = all[static_cast<size_t>(group.members.front())];
  int code = kNcclSuccess;
  {
    const std::lock_guard lock(mutex_);
    throw_if_aborted();
    code = table_.init(&group.comm, static_cast<int>(group.members.size()), id.data(),
                       static_cast<int>(place - group.members.begin()));
  }
  settle(group, code, "joining");
}

void NcclGroups::settle(NcclGroup& group, int code, const char* what) {
  for (const auto begin = Clock::now(); code == kNcclInProgress;) {
    if (seconds_since(begin) < kSpinSeconds) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kPoll);
    }
    {
      const std::lock_guard lock(mutex_);
      throw_if_aborted();
      const int asked = table_.async_error(group.comm, &code);
      if (asked != kNcclSuccess) code = asked;
    }
    if (code == kNcclInProgress && seconds_since(begin) > options_.join_timeout_s) {
      throw CommError(cat("[comm] NCCL: ", what, " was not through within ",
                          options_.join_timeout_s, " s on rank ", host_.rank()));
    }
  }
  if (code == kNcclSuccess) return;
  throw_if_aborted();
  throw CommError(text_of(what, code, group.comm));
}

void NcclGroups::make_known(NcclGroup& group, void* memory, size_t bytes) {
  if (group.comm == nullptr || bytes == 0) return;
  for (const NcclGroup::Known& known : group.known) {
    if (known.memory == memory) return;
  }
  NcclGroup::Known known{.memory = memory};
  const auto attempt = [&](auto function) {
    try {
      run(group, "registering memory",
          [&](void* comm) { return function(comm, memory, bytes, &known.handle); });
      return true;
    } catch (const CommError&) {
      if (aborted()) throw;
      return false;
    }
  };
  known.is_window = attempt(table_.register_window) && known.handle != nullptr;
  if (!known.is_window && !attempt(table_.register_buffer)) known.handle = nullptr;
  group.known.push_back(known);
}

void NcclGroups::forget(void* memory) {
  const std::lock_guard lock(mutex_);
  for (NcclGroup& group : groups_) {
    const auto found =
        std::find_if(group.known.begin(), group.known.end(),
                     [memory](const NcclGroup::Known& known) { return known.memory == memory; });
    if (found == group.known.end()) continue;
    if (group.comm != nullptr && found->handle != nullptr) {
      const auto function = found->is_window ? table_.deregister_window : table_.deregister_buffer;
      function(group.comm, found->handle);
    }
    group.known.erase(found);
  }
}

std::string NcclGroups::failure() {
  const std::lock_guard lock(mutex_);
  for (const NcclGroup& group : groups_) {
    if (group.comm == nullptr) continue;
    int state = kNcclSuccess;
    int code = table_.async_error(group.comm, &state);
    if (code == kNcclSuccess) code = state;
    if (code != kNcclSuccess && code != kNcclInProgress)
      return text_of("a collective", code, group.comm);
  }
  return {};
}

void NcclGroups::abort_all() noexcept {
  if (aborted_.exchange(true)) return;
  const std::lock_guard lock(mutex_);
  for (NcclGroup& group : groups_) {
    if (group.comm != nullptr) table_.abort(std::exchange(group.comm, nullptr));
  }
}

void NcclGroups::throw_if_aborted() const {
  if (aborted()) throw CommError("[comm] NCCL: communication has been aborted");
}

std::string NcclGroups::text_of(const char* what, int code, void* comm) const {
  const char* more = table_.last_error(comm);
  return cat("[comm] NCCL: ", what, " failed on rank ", host_.rank(), ": ", table_.error_text(code),
             " (", code, ")", more != nullptr && *more != '\0' ? cat(": ", more) : "",
             ". Hint: NCCL_DEBUG=INFO tells more.");
}

}  // namespace fsdp::comm
