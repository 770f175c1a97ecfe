// CUDA: sums of a gradient, see gradient_sums.h.
#include "libfsdp/kernels/cuda_launch.cuh"

namespace fsdp::kernels {
namespace {

constexpr int kQuantaPerBlock = kThreads / kQuantumLanes;

// One quantum's sum, by the 8 neighbouring threads that are its lanes; valid in the first of them.
// See Note [Order of a quantum's sum].
template <NormType kType>
__device__ double quantum_sum(const float* quantum, int lane, int& bad) {
  double sum = 0;
  for (int i = lane; i < kQuantum; i += kQuantumLanes) {
    const float value = quantum[i];
    bad += is_finite_bits(float_bits(value)) ? 0 : 1;
    sum += norm_term<kType>(value);
  }
  const auto from_lane = [sum](int j) { return __shfl_sync(0xffffffffU, sum, j, kQuantumLanes); };
  const double total = combine_quantum_lanes(from_lane);
  for (int offset = kQuantumLanes / 2; offset > 0; offset /= 2) {
    bad += __shfl_down_sync(0xffffffffU, bad, offset, kQuantumLanes);
  }
  return total;
}

__device__ void atomic_add(int64_t* at, int64_t amount) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(amount));
}

// Calls sink(quantum, sum) for every quantum once, in no order. All threads of a block run the same
// rounds, for the lanes exchange values by warp.
template <NormType kType, class Sink>
__device__ void for_each_quantum(const float* values, int64_t num_quanta, int64_t* non_finite,
                                 const Sink& sink) {
  const int lane = threadIdx.x % kQuantumLanes;
  const int64_t stride = int64_t{gridDim.x} * kQuantaPerBlock;
  for (int64_t first = int64_t{blockIdx.x} * kQuantaPerBlock; first < num_quanta; first += stride) {
    const int64_t wanted = first + threadIdx.x / kQuantumLanes;
    const int64_t quantum = wanted < num_quanta ? wanted : num_quanta - 1;
    int bad = 0;
    const double sum = quantum_sum<kType>(values + quantum * kQuantum, lane, bad);
    if (lane != 0 || wanted >= num_quanta) continue;
    if (bad != 0) atomic_add(non_finite, bad);
    sink(quantum, bad == 0 ? sum : 0.0);
  }
}

template <NormType kType>
__global__ void quantum_sums_kernel(const float* values, int64_t num_quanta, double* sums,
                                    int64_t* non_finite) {
  for_each_quantum<kType>(values, num_quanta, non_finite,
                          [sums](int64_t quantum, double sum) { sums[quantum] = sum; });
}

template <NormType kType>
__global__ void exact_sum_kernel(const float* values, int64_t num_quanta, int64_t* limbs,
                                 int64_t* non_finite) {
  __shared__ int64_t block_limbs[kExactSumLimbs];
  for (int i = threadIdx.x; i < kExactSumLimbs; i += kThreads) block_limbs[i] = 0;
  __syncthreads();
  int64_t* const shared = block_limbs;
  for_each_quantum<kType>(values, num_quanta, non_finite, [shared](int64_t, double sum) {
    spread_exact_term(sum, [shared](int index, int64_t amount) {
      if (amount != 0) atomic_add(shared + index, amount);
    });
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kExactSumLimbs; i += kThreads) {
    if (block_limbs[i] != 0) atomic_add(limbs + i, block_limbs[i]);
  }
}

// Magnitudes are ordered as their bits are.
__global__ void largest_magnitude_kernel(const float* values, int64_t n, uint32_t* largest,
                                         int64_t* non_finite) {
  uint32_t mine = 0;
  int64_t bad = 0;
  for (int64_t i = first_index(); i < n; i += index_stride()) {
    const uint32_t magnitude = float_bits(values[i]) & 0x7fffffffU;
    const bool finite = is_finite_bits(magnitude);
    bad += finite ? 0 : 1;
    mine = finite && magnitude > mine ? magnitude : mine;
  }
  if (bad != 0) atomic_add(non_finite, bad);
  const uint32_t of_warp = __reduce_max_sync(0xffffffffU, mine);
  if (threadIdx.x % 32 == 0 && of_warp != 0) atomicMax(largest, of_warp);
}

int blocks_of_quanta(int64_t n) { return blocks_for(n / kQuantum, kQuantaPerBlock); }

}  // namespace

int launch_quantum_sums(const float* values, int64_t n, NormType type, double* sums,
                        int64_t* non_finite, void* stream) {
  if (n % kQuantum != 0 || type == NormType::kInf) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  const auto kernel = type == NormType::kTwo ? quantum_sums_kernel<NormType::kTwo>
                                             : quantum_sums_kernel<NormType::kOne>;
  kernel<<<blocks_of_quanta(n), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      values, n / kQuantum, sums, non_finite);
  return cudaGetLastError();
}

int launch_gradient_sums(const float* values, int64_t n, NormType type, int64_t* limbs,
                         float* max_abs, int64_t* non_finite, void* stream) {
  if (n % kQuantum != 0) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  if (type == NormType::kInf) {
    largest_magnitude_kernel<<<blocks_for(n, kThreads), kThreads, 0, on>>>(
        values, n, reinterpret_cast<uint32_t*>(max_abs), non_finite);
    return cudaGetLastError();
  }
  const auto kernel =
      type == NormType::kTwo ? exact_sum_kernel<NormType::kTwo> : exact_sum_kernel<NormType::kOne>;
  kernel<<<blocks_of_quanta(n), kThreads, 0, on>>>(values, n / kQuantum, limbs, non_finite);
  return cudaGetLastError();
}

}  // namespace fsdp::kernels
