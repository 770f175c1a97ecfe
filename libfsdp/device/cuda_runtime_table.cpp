// Part of libfsdp_cuda.so: the runtime table over cudart.
#include "libfsdp/device/cuda_runtime_table.h"

#include <cuda_runtime_api.h>

#include <cstring>

namespace fsdp::device {
namespace {

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t as_event(void* event) { return static_cast<cudaEvent_t>(event); }

int create_stream(void** stream, int high_priority) {
  int lowest = 0;
  int highest = 0;
  if (const cudaError_t code = cudaDeviceGetStreamPriorityRange(&lowest, &highest)) return code;
  cudaStream_t made = nullptr;
  const cudaError_t code =
      cudaStreamCreateWithPriority(&made, cudaStreamNonBlocking, high_priority ? highest : lowest);
  *stream = made;
  return code;
}

int create_event(void** event, int with_timing) {
  cudaEvent_t made = nullptr;
  const cudaError_t code =
      cudaEventCreateWithFlags(&made, with_timing ? cudaEventDefault : cudaEventDisableTiming);
  *event = made;
  return code;
}

int query_event(void* event, int* done) {
  const cudaError_t code = cudaEventQuery(as_event(event));
  *done = code == cudaSuccess ? 1 : 0;
  return code == cudaErrorNotReady ? cudaSuccess : code;
}

static_assert(sizeof(cudaIpcMemHandle_t) == kCudaIpcHandleBytes);
static_assert(sizeof(cudaIpcEventHandle_t) == kCudaIpcHandleBytes);

int create_shared_event(void** event) {
  cudaEvent_t made = nullptr;
  const cudaError_t code =
      cudaEventCreateWithFlags(&made, cudaEventDisableTiming | cudaEventInterprocess);
  *event = made;
  return code;
}

int get_event_handle(void* handle, void* event) {
  cudaIpcEventHandle_t made;
  const cudaError_t code = cudaIpcGetEventHandle(&made, as_event(event));
  std::memcpy(handle, &made, sizeof(made));
  return code;
}

int open_event(void** event, const void* handle) {
  cudaIpcEventHandle_t from;
  std::memcpy(&from, handle, sizeof(from));
  cudaEvent_t opened = nullptr;
  const cudaError_t code = cudaIpcOpenEventHandle(&opened, from);
  *event = opened;
  return code;
}

int get_memory_handle(void* handle, void* memory) {
  cudaIpcMemHandle_t made;
  const cudaError_t code = cudaIpcGetMemHandle(&made, memory);
  std::memcpy(handle, &made, sizeof(made));
  return code;
}

int open_memory(void** memory, const void* handle) {
  cudaIpcMemHandle_t from;
  std::memcpy(&from, handle, sizeof(from));
  return cudaIpcOpenMemHandle(memory, from, cudaIpcMemLazyEnablePeerAccess);
}

const CudaRuntimeTable kTable = {
    kCudaTableVersion,
    [](int* count) -> int { return cudaGetDeviceCount(count); },
    [](int device) -> int { return cudaSetDevice(device); },
    [](size_t* free_bytes, size_t* total_bytes) -> int {
      return cudaMemGetInfo(free_bytes, total_bytes);
    },
    [](void** memory, size_t bytes) -> int { return cudaMalloc(memory, bytes); },
    [](void* memory) -> int { return cudaFree(memory); },
    [](void** memory, size_t bytes) -> int { return cudaMallocHost(memory, bytes); },
    [](void* memory) -> int { return cudaFreeHost(memory); },
    create_stream,
    [](void* stream) -> int { return cudaStreamDestroy(as_stream(stream)); },
    [](void* stream) -> int { return cudaStreamSynchronize(as_stream(stream)); },
    create_event,
    [](void* event) -> int { return cudaEventDestroy(as_event(event)); },
    [](void* event, void* stream) -> int {
      return cudaEventRecord(as_event(event), as_stream(stream));
    },
    [](void* stream, void* event) -> int {
      return cudaStreamWaitEvent(as_stream(stream), as_event(event), 0);
    },
    [](void* event) -> int { return cudaEventSynchronize(as_event(event)); },
    query_event,
    [](void* begin, void* end, float* ms) -> int {
      return cudaEventElapsedTime(ms, as_event(begin), as_event(end));
    },
    [](void* to, const void* from, size_t bytes, void* stream) -> int {
      return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, as_stream(stream));
    },
    [](void* memory, int value, size_t bytes, void* stream) -> int {
      return cudaMemsetAsync(memory, value, bytes, as_stream(stream));
    },
    [](int code) { return cudaGetErrorName(static_cast<cudaError_t>(code)); },
    [](int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); },
    [](int code) -> int { return code == cudaErrorMemoryAllocation ? 1 : 0; },
    create_shared_event,
    get_event_handle,
    open_event,
    get_memory_handle,
    open_memory,
    [](void* memory) -> int { return cudaIpcCloseMemHandle(memory); },
    [](int device, char* text) -> int {
      return cudaDeviceGetPCIBusId(text, static_cast<int>(kCudaCardBytes), device);
    },
    0,
};

}  // namespace
}  // namespace fsdp::device

extern "C" __attribute__((visibility("default"))) const fsdp::device::CudaRuntimeTable*
fsdp_cuda_runtime_table() {
  return &fsdp::device::kTable;
}
