// CUDA: optimizer steps, see update.h.
#include "libfsdp/kernels/any_precision.h"
#include "libfsdp/kernels/cuda_launch.cuh"
#include "libfsdp/kernels/parameter_forms.h"
#include "libfsdp/kernels/quantized_state.h"

namespace fsdp::kernels {
namespace {

template <class Parameter>
struct AdamWBody {
  Parameter parameter;
  const float* gradient;
  float* exp_avg;
  float* exp_avg_sq;
  AdamWScalars scalars;
  __device__ void operator()(int64_t i) const {
    float m = exp_avg[i];
    float v = exp_avg_sq[i];
    parameter.store(i, adamw_element(parameter.load(i), gradient[i], m, v, scalars));
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
  }
};

template <class Parameter>
struct SgdBody {
  Parameter parameter;
  const float* gradient;
  float* buffer;
  bool nesterov;
  SgdScalars scalars;
  __device__ void operator()(int64_t i) const {
    if (buffer == nullptr) {
      parameter.store(i, sgd_element(parameter.load(i), gradient[i], scalars));
      return;
    }
    float b = buffer[i];
    const float p = parameter.load(i);
    parameter.store(i, nesterov ? sgd_momentum_element<true>(p, gradient[i], b, scalars)
                                : sgd_momentum_element<false>(p, gradient[i], b, scalars));
    buffer[i] = b;
  }
};

__constant__ const DynamicMap kSignedMap = make_dynamic_map(true);
__constant__ const DynamicMap kUnsignedMap = make_dynamic_map(false);

__device__ void copy_map(const DynamicMap& from, DynamicMap& to) {
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    to.values[i] = from.values[i];
    if (i < 255) to.midpoints[i] = from.midpoints[i];
  }
}

// Largest magnitude of a thread block's values, in all threads. `largest` is shared and zero.
__device__ float block_absmax(float value, uint32_t* largest) {
  const uint32_t magnitude = float_bits(value) & 0x7fffffffU;  // Ordered as the floats are.
  const uint32_t of_warp = __reduce_max_sync(0xffffffffU, magnitude);
  if (threadIdx.x % 32 == 0) atomicMax(largest, of_warp);
  __syncthreads();
  return bits_float(*largest);
}

// One thread block of kStateBlock threads per block of state, see Note [8-bit state].
template <class Parameter>
__global__ void adamw_8bit_kernel(Parameter parameter, const float* gradient, QuantizedState state,
                                  int64_t n, AdamWScalars scalars) {
  __shared__ DynamicMap maps[2];
  __shared__ uint32_t largest[2];
  copy_map(kSignedMap, maps[0]);
  copy_map(kUnsignedMap, maps[1]);
  const int64_t num_blocks = (n + kStateBlock - 1) / kStateBlock;
  for (int64_t block = blockIdx.x; block < num_blocks; block += gridDim.x) {
    const int64_t i = block * kStateBlock + threadIdx.x;
    if (threadIdx.x < 2) largest[threadIdx.x] = 0;
    __syncthreads();
    float m = 0;
    float v = 0;
    if (i < n) {
      m = maps[0].values[state.code1[i]] * state.absmax1[block];
      v = maps[1].values[state.code2[i]] * state.absmax2[block];
      parameter.store(i, adamw_element(parameter.load(i), gradient[i], m, v, scalars));
    }
    const float absmax1 = block_absmax(m, &largest[0]);
    const float absmax2 = block_absmax(v, &largest[1]);
    if (i < n) {
      state.code1[i] = nearest_code(maps[0].midpoints, m / block_divisor(absmax1));
      state.code2[i] = nearest_code(maps[1].midpoints, v / block_divisor(absmax2));
    }
    if (threadIdx.x == 0) {
      state.absmax1[block] = absmax1;
      state.absmax2[block] = absmax2;
    }
    __syncthreads();
  }
}

// Launchers that take any form of a parameter.
struct AdamWLaunch {
  const float* gradient;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t n;
  const AdamWScalars* scalars;
  void* stream;
  template <class Parameter>
  int operator()(Parameter parameter) const {
    return for_each(n, stream,
                    AdamWBody<Parameter>{parameter, gradient, exp_avg, exp_avg_sq, *scalars});
  }
};

struct SgdLaunch {
  const float* gradient;
  float* buffer;
  int64_t n;
  bool nesterov;
  const SgdScalars* scalars;
  void* stream;
  template <class Parameter>
  int operator()(Parameter parameter) const {
    return for_each(n, stream, SgdBody<Parameter>{parameter, gradient, buffer, nesterov, *scalars});
  }
};

struct QuantizedAdamWLaunch {
  const float* gradient;
  const QuantizedState* state;
  int64_t n;
  const AdamWScalars* scalars;
  void* stream;
  template <class Parameter>
  int operator()(Parameter parameter) const {
    if (n == 0) return cudaSuccess;
    adamw_8bit_kernel<<<blocks_for(n, kStateBlock), kStateBlock, 0,
                        static_cast<cudaStream_t>(stream)>>>(parameter, gradient, *state, n,
                                                             *scalars);
    return cudaGetLastError();
  }
};

struct ForEachLaunch {
  int64_t n;
  void* stream;
  template <class Body>
  int operator()(const Body& body) const {
    return for_each(n, stream, body);
  }
};

}  // namespace

int launch_adamw(const ParameterArrays* parameter, const float* gradient, float* exp_avg,
                 float* exp_avg_sq, int64_t n, const AdamWScalars* scalars, void* stream) {
  return with_parameter(*parameter, AdamWLaunch{gradient, exp_avg, exp_avg_sq, n, scalars, stream});
}

int launch_sgd(const ParameterArrays* parameter, const float* gradient, float* buffer, int64_t n,
               int nesterov, const SgdScalars* scalars, void* stream) {
  return with_parameter(*parameter, SgdLaunch{gradient, buffer, n, nesterov != 0, scalars, stream});
}

int launch_any_precision_adamw(const AnyPrecisionArrays* arrays, int64_t n,
                               const AnyPrecisionScalars* scalars, void* stream) {
  return with_any_precision(*arrays, *scalars, ForEachLaunch{n, stream});
}

int launch_adamw_8bit(const ParameterArrays* parameter, const float* gradient,
                      const QuantizedState* state, int64_t n, const AdamWScalars* scalars,
                      void* stream) {
  return with_parameter(*parameter, QuantizedAdamWLaunch{gradient, state, n, scalars, stream});
}

}  // namespace fsdp::kernels
