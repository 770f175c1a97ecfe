// Opens the CUDA part of the library when, and only when, it is wanted: a run on the CPU never maps
// it.
#pragma once

#include <string>

#include "libfsdp/device/cuda_runtime_table.h"

namespace fsdp::device {

/// Whether CUDA can be used, and if not why, for people: "no CUDA device: ...", "libfsdp_cuda.so
/// not found in ...".
struct CudaStatus {
  bool usable = false;
  int num_devices = 0;
  std::string reason;  ///< Empty when usable.
};

/// Opens libfsdp_cuda.so at the first call (environment FSDP_CUDA_LIBRARY, then beside the program,
/// then ../lib, then the loader's own search) and counts devices. Thread-safe; the answer does not
/// change within a process.
const CudaStatus& cuda_status();

/// The runtime's functions. Throws ConfigError with cuda_status().reason when the library could not
/// be opened; it is callable without a device (every call then returns CUDA's error).
const CudaRuntimeTable& cuda_runtime();

/// Address of an exported function of libfsdp_cuda.so, for other tables. Throws as cuda_runtime(),
/// and InternalError for an unknown name.
void* cuda_symbol(const char* name);

/// Throws DeviceMemoryError when `code` means out of memory, else InternalError; the text has
/// CUDA's name and explanation. 0 returns.
void check_cuda(int code, const char* what);

}  // namespace fsdp::device
