// How the kernels of libfsdp_cuda.so are launched. For our .cu files.
#pragma once

#include <cuda_runtime_api.h>

#include "libfsdp/kernels/cuda_launchers.h"

namespace fsdp::kernels {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;  // enough to fill any device; the loops stride over the rest

inline int blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

__device__ inline int64_t first_index() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline int64_t index_stride() { return int64_t{gridDim.x} * blockDim.x; }

// Calls body(i) for i in [0, n).
template <class Body>
__global__ void for_each_kernel(int64_t n, Body body) {
  for (int64_t i = first_index(); i < n; i += index_stride()) body(i);
}

template <class Body>
int for_each(int64_t n, void* stream, Body body) {
  if (n == 0) return cudaSuccess;
  for_each_kernel<<<blocks_for(n, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      n, body);
  return cudaGetLastError();
}

}  // namespace fsdp::kernels
