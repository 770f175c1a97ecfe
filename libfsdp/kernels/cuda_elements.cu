// CUDA: split masters and folds.
#include "libfsdp/kernels/cuda_launch.cuh"
#include "libfsdp/kernels/parameter_forms.h"

namespace fsdp::kernels {
namespace {

constexpr int kFoldSources = 64;  // by value in the launch, 512 bytes

struct SplitBody {
  const float* master;
  SplitParameter to;
  __device__ void operator()(int64_t i) const { to.store(i, master[i]); }
};

struct JoinBody {
  SplitParameter from;
  float* master;
  __device__ void operator()(int64_t i) const { master[i] = from.load(i); }
};

SplitParameter split_parameter(uint16_t* high, uint16_t* remainder) {
  ParameterArrays arrays;
  arrays.high = high;
  arrays.remainder = remainder;
  return SplitParameter(arrays);
}

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

struct ConvertToBf16 {
  const float* from;
  uint16_t* to;
  __device__ void operator()(int64_t i) const { to[i] = round_bf16(from[i]); }
};

struct ConvertToF16 {
  const float* from;
  uint16_t* to;
  __device__ void operator()(int64_t i) const { to[i] = round_f16(from[i]); }
};

struct ScaleBody {
  float* values;
  float factor;
  float limit;
  __device__ void operator()(int64_t i) const {
    values[i] = prepared_gradient(values[i], factor, limit);
  }
};

}  // namespace

int launch_split(const float* master, uint16_t* high, uint16_t* remainder, int64_t n,
                 void* stream) {
  return for_each(n, stream, SplitBody{master, split_parameter(high, remainder)});
}

int launch_join(const uint16_t* high, const uint16_t* remainder, float* master, int64_t n,
                void* stream) {
  const SplitParameter from =
      split_parameter(const_cast<uint16_t*>(high), const_cast<uint16_t*>(remainder));
  return for_each(n, stream, JoinBody{from, master});
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

int launch_convert(const float* from, void* to, FoldType type, int64_t n, void* stream) {
  switch (type) {
    case FoldType::kF32:
      return cudaMemcpyAsync(to, from, static_cast<size_t>(n) * sizeof(float),
                             cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream));
    case FoldType::kBf16:
      return for_each(n, stream, ConvertToBf16{from, static_cast<uint16_t*>(to)});
    case FoldType::kF16:
      return for_each(n, stream, ConvertToF16{from, static_cast<uint16_t*>(to)});
  }
  return cudaErrorInvalidValue;
}

int launch_scale(float* values, int64_t n, float factor, float limit, void* stream) {
  return for_each(n, stream, ScaleBody{values, factor, limit});
}

}  // namespace fsdp::kernels
