// Part of libfsdp_cuda.so: the table over NCCL. Not yet run on a GPU: see docs/status.md.
#include "libfsdp/comm/device/nccl_table.h"

#include <nccl.h>

#include <cstring>

namespace fsdp::comm {
namespace {

static_assert(NCCL_UNIQUE_ID_BYTES == kNcclIdBytes);
static_assert(ncclSuccess == kNcclSuccess && ncclInProgress == kNcclInProgress);

ncclComm_t as_comm(void* comm) { return static_cast<ncclComm_t>(comm); }
cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

ncclDataType_t as_type(NcclType type) {
  switch (type) {
    case NcclType::kF32:
      return ncclFloat32;
    case NcclType::kBf16:
      return ncclBfloat16;
    case NcclType::kF16:
      return ncclFloat16;
    case NcclType::kU8:
      break;
  }
  return ncclUint8;
}

int make_id(void* id) {
  ncclUniqueId made;
  const ncclResult_t code = ncclGetUniqueId(&made);
  std::memcpy(id, made.internal, kNcclIdBytes);
  return code;
}

int init(void** comm, int size, const void* id, int rank) {
  ncclUniqueId with;
  std::memcpy(with.internal, id, kNcclIdBytes);
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclComm_t made = nullptr;
  const ncclResult_t code = ncclCommInitRankConfig(&made, size, with, rank, &config);
  *comm = made;
  return code;
}

int async_error(void* comm, int* state) {
  ncclResult_t now = ncclSuccess;
  const ncclResult_t code = ncclCommGetAsyncError(as_comm(comm), &now);
  *state = now;
  return code;
}

int register_window(void* comm, void* memory, size_t bytes, void** window) {
  ncclWindow_t made = nullptr;
  const ncclResult_t code =
      ncclCommWindowRegister(as_comm(comm), memory, bytes, &made, NCCL_WIN_COLL_SYMMETRIC);
  *window = made;
  return code;
}

int deregister_window(void* comm, void* window) {
  return ncclCommWindowDeregister(as_comm(comm), static_cast<ncclWindow_t>(window));
}

const NcclTable kTable = {
    kNcclTableVersion,
    make_id,
    init,
    async_error,
    [](void* comm) -> int { return ncclCommFinalize(as_comm(comm)); },
    [](void* comm) -> int { return ncclCommDestroy(as_comm(comm)); },
    [](void* comm) -> int { return ncclCommAbort(as_comm(comm)); },
    [](void** memory, size_t bytes) -> int { return ncclMemAlloc(memory, bytes); },
    [](void* memory) -> int { return ncclMemFree(memory); },
    register_window,
    deregister_window,
    [](void* comm, void* memory, size_t bytes, void** handle) -> int {
      return ncclCommRegister(as_comm(comm), memory, bytes, handle);
    },
    [](void* comm, void* handle) -> int { return ncclCommDeregister(as_comm(comm), handle); },
    [](const void* from, void* to, size_t bytes, void* comm, void* stream) -> int {
      return ncclAllGather(from, to, bytes, ncclUint8, as_comm(comm), as_stream(stream));
    },
    [](const void* from, void* to, size_t count, NcclType type, void* comm, void* stream) -> int {
      return ncclReduceScatter(from, to, count, as_type(type), ncclSum, as_comm(comm),
                               as_stream(stream));
    },
    [](const void* from, void* to, size_t count, NcclType type, void* comm, void* stream) -> int {
      return ncclAllReduce(from, to, count, as_type(type), ncclSum, as_comm(comm),
                           as_stream(stream));
    },
    [](const void* from, size_t bytes, int peer, void* comm, void* stream) -> int {
      return ncclSend(from, bytes, ncclUint8, peer, as_comm(comm), as_stream(stream));
    },
    [](void* to, size_t bytes, int peer, void* comm, void* stream) -> int {
      return ncclRecv(to, bytes, ncclUint8, peer, as_comm(comm), as_stream(stream));
    },
    []() -> int { return ncclGroupStart(); },
    []() -> int { return ncclGroupEnd(); },
    [](int code) { return ncclGetErrorString(static_cast<ncclResult_t>(code)); },
    [](void* comm) { return ncclGetLastError(as_comm(comm)); },
};

}  // namespace
}  // namespace fsdp::comm

extern "C" __attribute__((visibility("default"))) const fsdp::comm::NcclTable* fsdp_nccl_table() {
  return &fsdp::comm::kTable;
}
