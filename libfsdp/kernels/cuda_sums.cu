// CUDA: sums of a gradient, see gradient_sums.h.
#include "libfsdp/kernels/cuda_launch.cuh"

namespace fsdp::kernels {
namespace {

constexpr int kQuantaPerBlock = kThreads / kSquareLanes;

// One quantum's sum, by the 8 neighbouring threads that are its lanes; valid in the first of them.
// See Note [Order of a square sum].
__device__ double quantum_sum(const float* quantum, int lane, int& bad) {
  double sum = 0;
  for (int i = lane; i < kQuantum; i += kSquareLanes) {
    const float value = quantum[i];
    bad += is_finite_bits(float_bits(value)) ? 0 : 1;
    sum += static_cast<double>(value) * static_cast<double>(value);
  }
  const auto from_lane = [sum](int j) { return __shfl_sync(0xffffffffU, sum, j, kSquareLanes); };
  const double total = combine_square_lanes(from_lane);
  for (int offset = kSquareLanes / 2; offset > 0; offset /= 2) {
    bad += __shfl_down_sync(0xffffffffU, bad, offset, kSquareLanes);
  }
  return total;
}

__device__ void atomic_add(int64_t* at, int64_t amount) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(amount));
}

// Calls sink(quantum, sum) for every quantum once, in no order. All threads of a block run the same
// rounds, for the lanes exchange values by warp.
template <class Sink>
__device__ void for_each_quantum(const float* values, int64_t num_quanta, int64_t* non_finite,
                                 const Sink& sink) {
  const int lane = threadIdx.x % kSquareLanes;
  const int64_t stride = int64_t{gridDim.x} * kQuantaPerBlock;
  for (int64_t first = int64_t{blockIdx.x} * kQuantaPerBlock; first < num_quanta; first += stride) {
    const int64_t wanted = first + threadIdx.x / kSquareLanes;
    const int64_t quantum = wanted < num_quanta ? wanted : num_quanta - 1;
    int bad = 0;
    const double sum = quantum_sum(values + quantum * kQuantum, lane, bad);
    if (lane != 0 || wanted >= num_quanta) continue;
    if (bad != 0) atomic_add(non_finite, bad);
    sink(quantum, bad == 0 ? sum : 0.0);
  }
}

__global__ void quantum_sums_kernel(const float* values, int64_t num_quanta, double* sums,
                                    int64_t* non_finite) {
  for_each_quantum(values, num_quanta, non_finite,
                   [sums](int64_t quantum, double sum) { sums[quantum] = sum; });
}

__global__ void exact_sum_kernel(const float* values, int64_t num_quanta, int64_t* limbs,
                                 int64_t* non_finite) {
  __shared__ int64_t block_limbs[kExactSumLimbs];
  for (int i = threadIdx.x; i < kExactSumLimbs; i += kThreads) block_limbs[i] = 0;
  __syncthreads();
  int64_t* const shared = block_limbs;
  for_each_quantum(values, num_quanta, non_finite, [shared](int64_t, double sum) {
    spread_exact_term(sum, [shared](int index, int64_t amount) {
      if (amount != 0) atomic_add(shared + index, amount);
    });
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kExactSumLimbs; i += kThreads) {
    if (block_limbs[i] != 0) atomic_add(limbs + i, block_limbs[i]);
  }
}

}  // namespace

int launch_quantum_sums(const float* values, int64_t n, double* sums, int64_t* non_finite,
                        void* stream) {
  if (n % kQuantum != 0) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  const int blocks = blocks_for(n / kQuantum, kQuantaPerBlock);
  quantum_sums_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      values, n / kQuantum, sums, non_finite);
  return cudaGetLastError();
}

int launch_exact_sum(const float* values, int64_t n, int64_t* limbs, int64_t* non_finite,
                     void* stream) {
  if (n % kQuantum != 0) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  const int blocks = blocks_for(n / kQuantum, kQuantaPerBlock);
  exact_sum_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(values, n / kQuantum,
                                                                               limbs, non_finite);
  return cudaGetLastError();
}

}  // namespace fsdp::kernels
