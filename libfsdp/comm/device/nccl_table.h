// NCCL behind the boundary of libfsdp_cuda.so, as a table of C functions. Both sides include this
// file; C++17, no NCCL headers.
//
// Communicators, windows and streams cross as pointers, results as NCCL's numbers. Communicators do
// not block: a call may return kNcclInProgress, and then async_error() says when it is through.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fsdp::comm {

/// Raised whenever the table's layout changes.
constexpr int32_t kNcclTableVersion = 1;
constexpr size_t kNcclIdBytes = 128;
constexpr int kNcclSuccess = 0;
constexpr int kNcclInProgress = 7;

enum class NcclType : int32_t { kU8, kF32, kBf16, kF16 };

struct NcclTable {
  int32_t version;
  /// kNcclIdBytes of host memory, for the ranks of one new communicator.
  int (*make_id)(void* id);
  int (*init)(void** comm, int size, const void* id, int rank);
  int (*async_error)(void* comm, int* state);
  int (*finalize)(void* comm);
  int (*destroy)(void* comm);
  /// Ends what is under way on the device, and the communicator.
  int (*abort)(void* comm);
  int (*allocate)(void** memory, size_t bytes);
  int (*free_memory)(void* memory);
  /// Memory of allocate(), made known to all ranks of `comm` (collective), or to this one.
  int (*register_window)(void* comm, void* memory, size_t bytes, void** window);
  int (*deregister_window)(void* comm, void* window);
  int (*register_buffer)(void* comm, void* memory, size_t bytes, void** handle);
  int (*deregister_buffer)(void* comm, void* handle);
  // Enqueued on `stream`; counts are those of one rank's part.
  int (*all_gather)(const void* from, void* to, size_t bytes, void* comm, void* stream);
  int (*reduce_scatter)(const void* from, void* to, size_t count, NcclType type, void* comm,
                        void* stream);
  int (*all_reduce)(const void* from, void* to, size_t count, NcclType type, void* comm,
                    void* stream);
  int (*send)(const void* from, size_t bytes, int peer, void* comm, void* stream);
  int (*receive)(void* to, size_t bytes, int peer, void* comm, void* stream);
  int (*group_start)();
  int (*group_end)();
  const char* (*error_text)(int code);
  /// The last error's explanation; `comm` may be null.
  const char* (*last_error)(void* comm);
};

/// Name of the exported function of type `const NcclTable* ()`.
constexpr const char* kNcclTableSymbol = "fsdp_nccl_table";

/// The table of the loaded libfsdp_cuda.so. Throws ConfigError when it cannot be opened.
const NcclTable& nccl();

}  // namespace fsdp::comm
