// CUDA launchers of the bodies in element_math.h. Part of libfsdp_cuda.so.
#include <cuda_runtime_api.h>

#include "libfsdp/kernels/cuda_kernel_table.h"

namespace fsdp::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;  // enough to fill any device; the loops stride over the rest
constexpr int kFoldSources = 64;      // by value in the launch, 512 bytes
constexpr int kQuantaPerBlock = kThreads / kSquareLanes;

int blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

__device__ int64_t first_index() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ int64_t index_stride() { return int64_t{gridDim.x} * blockDim.x; }

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

struct F32MasterOnDevice {
  float* values;
  __device__ float load(int64_t i) const { return values[i]; }
  __device__ void store(int64_t i, float value) const { values[i] = value; }
};

struct SplitMasterOnDevice {
  uint16_t* high;
  uint16_t* remainder;
  __device__ float load(int64_t i) const { return join_master(high[i], remainder[i]); }
  __device__ void store(int64_t i, float value) const {
    const SplitValue split = fsdp::kernels::split_master(value);
    high[i] = split.high;
    remainder[i] = split.remainder;
  }
};

struct SplitBody {
  const float* master;
  SplitMasterOnDevice to;
  __device__ void operator()(int64_t i) const { to.store(i, master[i]); }
};

struct JoinBody {
  SplitMasterOnDevice from;
  float* master;
  __device__ void operator()(int64_t i) const { master[i] = from.load(i); }
};

struct SourceList {
  const void* at[kFoldSources];
  int count;
};

template <class Source>
struct FoldBody {
  float* destination;
  SourceList sources;
  bool accumulate;
  __device__ float read(int k, int64_t i) const {
    return Source::widen(static_cast<const typename Source::Storage*>(sources.at[k])[i]);
  }
  __device__ void operator()(int64_t i) const {
    float sum = accumulate ? destination[i] : read(0, i);
    for (int k = accumulate ? 0 : 1; k < sources.count; ++k) sum = sum + read(k, i);
    destination[i] = sum;
  }
};

template <class Master>
struct AdamWBody {
  Master master;
  const float* gradient;
  float* exp_avg;
  float* exp_avg_sq;
  AdamWScalars scalars;
  __device__ void operator()(int64_t i) const {
    float m = exp_avg[i];
    float v = exp_avg_sq[i];
    master.store(i, adamw_element(master.load(i), gradient[i], m, v, scalars));
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
  }
};

template <class Master>
struct SgdBody {
  Master master;
  const float* gradient;
  float* buffer;
  bool nesterov;
  SgdScalars scalars;
  __device__ void operator()(int64_t i) const {
    if (buffer == nullptr) {
      master.store(i, sgd_element(master.load(i), gradient[i], scalars));
      return;
    }
    float b = buffer[i];
    const float p = master.load(i);
    master.store(i, nesterov ? sgd_momentum_element<true>(p, gradient[i], b, scalars)
                             : sgd_momentum_element<false>(p, gradient[i], b, scalars));
    buffer[i] = b;
  }
};

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

int launch_split(const float* master, uint16_t* high, uint16_t* remainder, int64_t n,
                 void* stream) {
  return for_each(n, stream, SplitBody{master, {high, remainder}});
}

int launch_join(const uint16_t* high, const uint16_t* remainder, float* master, int64_t n,
                void* stream) {
  return for_each(
      n, stream, JoinBody{{const_cast<uint16_t*>(high), const_cast<uint16_t*>(remainder)}, master});
}

template <class Source>
int fold_typed(float* destination, const void* const* sources, int count, int64_t n,
               bool accumulate, void* stream) {
  for (int begin = 0; begin < count; begin += kFoldSources) {
    FoldBody<Source> body{destination, {}, accumulate || begin > 0};
    body.sources.count = count - begin < kFoldSources ? count - begin : kFoldSources;
    for (int k = 0; k < body.sources.count; ++k) body.sources.at[k] = sources[begin + k];
    if (const int code = for_each(n, stream, body)) return code;
  }
  return cudaSuccess;
}

int launch_fold(float* destination, const void* const* sources, int count, FoldType type, int64_t n,
                int accumulate, void* stream) {
  if (count == 0) {
    if (accumulate != 0) return cudaSuccess;
    return cudaMemsetAsync(destination, 0, static_cast<size_t>(n) * sizeof(float),
                           static_cast<cudaStream_t>(stream));
  }
  switch (type) {
    case FoldType::kF32:
      return fold_typed<F32Source>(destination, sources, count, n, accumulate != 0, stream);
    case FoldType::kBf16:
      return fold_typed<Bf16Source>(destination, sources, count, n, accumulate != 0, stream);
    case FoldType::kF16:
      return fold_typed<F16Source>(destination, sources, count, n, accumulate != 0, stream);
  }
  return cudaErrorInvalidValue;
}

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

int launch_adamw_f32(float* master, const float* gradient, float* exp_avg, float* exp_avg_sq,
                     int64_t n, const AdamWScalars* scalars, void* stream) {
  using Body = AdamWBody<F32MasterOnDevice>;
  return for_each(n, stream, Body{{master}, gradient, exp_avg, exp_avg_sq, *scalars});
}

int launch_adamw_split(uint16_t* high, uint16_t* remainder, const float* gradient, float* exp_avg,
                       float* exp_avg_sq, int64_t n, const AdamWScalars* scalars, void* stream) {
  using Body = AdamWBody<SplitMasterOnDevice>;
  return for_each(n, stream, Body{{high, remainder}, gradient, exp_avg, exp_avg_sq, *scalars});
}

int launch_sgd_f32(float* master, const float* gradient, float* buffer, int64_t n, int nesterov,
                   const SgdScalars* scalars, void* stream) {
  using Body = SgdBody<F32MasterOnDevice>;
  return for_each(n, stream, Body{{master}, gradient, buffer, nesterov != 0, *scalars});
}

int launch_sgd_split(uint16_t* high, uint16_t* remainder, const float* gradient, float* buffer,
                     int64_t n, int nesterov, const SgdScalars* scalars, void* stream) {
  using Body = SgdBody<SplitMasterOnDevice>;
  return for_each(n, stream, Body{{high, remainder}, gradient, buffer, nesterov != 0, *scalars});
}

const CudaKernelTable kTable = {
    kCudaKernelTableVersion, launch_split,     launch_join,      launch_fold,
    launch_quantum_sums,     launch_exact_sum, launch_adamw_f32, launch_adamw_split,
    launch_sgd_f32,          launch_sgd_split,
};

}  // namespace
}  // namespace fsdp::kernels

extern "C" __attribute__((visibility("default"))) const fsdp::kernels::CudaKernelTable*
fsdp_cuda_kernel_table() {
  return &fsdp::kernels::kTable;
}
