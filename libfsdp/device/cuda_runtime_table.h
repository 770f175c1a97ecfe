// The boundary between programs and libfsdp_cuda.so: a table of C functions. Both sides include
// this file.
//
// Streams and events cross as pointers, results as the CUDA runtime's error numbers (0 = success).
// C++17, no CUDA headers: whoever uses it needs no toolkit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fsdp::device {

/// Raised whenever a table's layout changes; a library of another version is refused.
constexpr int32_t kCudaTableVersion = 2;
/// Bytes of what other processes open memory and events by.
constexpr size_t kCudaIpcHandleBytes = 64;
/// Bytes of the text that says which card a device is.
constexpr size_t kCudaCardBytes = 32;

struct CudaRuntimeTable {
  int32_t version;
  int (*device_count)(int* count);
  int (*set_device)(int device);
  int (*memory_info)(size_t* free_bytes, size_t* total_bytes);
  int (*allocate_device)(void** memory, size_t bytes);
  int (*free_device)(void* memory);
  int (*allocate_pinned)(void** memory, size_t bytes);
  int (*free_pinned)(void* memory);
  int (*create_stream)(void** stream, int high_priority);
  int (*destroy_stream)(void* stream);
  int (*synchronize_stream)(void* stream);
  int (*create_event)(void** event, int with_timing);
  int (*destroy_event)(void* event);
  int (*record_event)(void* event, void* stream);
  int (*stream_wait_event)(void* stream, void* event);
  int (*synchronize_event)(void* event);
  int (*query_event)(void* event, int* done);
  int (*elapsed_ms)(void* begin, void* end, float* milliseconds);
  int (*copy_async)(void* to, const void* from, size_t bytes, void* stream);
  int (*fill_async)(void* memory, int value, size_t bytes, void* stream);
  const char* (*error_name)(int code);
  const char* (*error_text)(int code);
  int (*is_out_of_memory)(int code);
  // Between processes; a handle is kCudaIpcHandleBytes of host memory. The sizes of shared blocks
  // are multiples of 2 MiB, or a handle could show more than its block.
  int (*create_shared_event)(void** event);  ///< Without timing.
  int (*get_event_handle)(void* handle, void* event);
  int (*open_event)(void** event, const void* handle);
  int (*get_memory_handle)(void* handle, void* memory);
  int (*open_memory)(void** memory, const void* handle);
  int (*close_memory)(void* memory);
  /// Text of kCudaCardBytes, equal for two devices of one host exactly when they are one card.
  int (*card_of)(int device, char* text);
  /// 1 = the host reads and writes device memory as its own: a stand-in for tests.
  int32_t memory_is_host;
};

/// Name of the exported function of type `const CudaRuntimeTable* ()`.
constexpr const char* kCudaRuntimeTableSymbol = "fsdp_cuda_runtime_table";

}  // namespace fsdp::device
