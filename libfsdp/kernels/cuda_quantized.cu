// CUDA: weights in 4 and 8 bits, see quantized_weight.h.
#include "libfsdp/kernels/cuda_launch.cuh"
#include "libfsdp/kernels/element_stores.h"
#include "libfsdp/kernels/four_bit.h"

namespace fsdp::kernels {
namespace {

constexpr int kWarp = 32;

__constant__ const FourBitTable kNf4Table = make_four_bit_table(FourBitCode::kNf4);
__constant__ const FourBitTable kFp4Table = make_four_bit_table(FourBitCode::kFp4);
__constant__ const DynamicMap kAbsmaxMap = make_dynamic_map(true);

// Threads look up different entries at a time, which constant memory would serve one by one.
__device__ void copy_table(FourBitCode code, FourBitTable& to) {
  const FourBitTable& from = code == FourBitCode::kNf4 ? kNf4Table : kFp4Table;
  for (int i = threadIdx.x; i < 16; i += blockDim.x) {
    to.values[i] = from.values[i];
    to.order[i] = from.order[i];
    if (i < 15) to.midpoints[i] = from.midpoints[i];
  }
  __syncthreads();
}

__device__ float warp_absmax(float largest) {
  return bits_float(__reduce_max_sync(0xffffffffU, float_bits(largest)));
}
__device__ float magnitude(float value) { return bits_float(float_bits(value) & 0x7fffffffU); }
// A NaN is larger than an infinity, as on the CPU.
__device__ float larger(float a, float b) { return float_bits(a) > float_bits(b) ? a : b; }

// One warp per block of elements.
template <class Source>
__global__ void quantize_4bit_kernel(const typename Source::Storage* values, int64_t numel,
                                     FourBitCode code, int64_t blocksize, uint8_t* packed,
                                     float* absmax) {
  __shared__ FourBitTable table;
  copy_table(code, table);
  const int lane = threadIdx.x % kWarp;
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  for (int64_t block = first_index() / kWarp; block < blocks; block += index_stride() / kWarp) {
    const int64_t begin = block * blocksize;
    const bool is_short = numel - begin < blocksize;
    const int64_t n = is_short ? numel - begin : blocksize;
    float largest = 0;
    for (int64_t i = lane; i < n; i += kWarp)
      largest = larger(largest, magnitude(Source::widen(values[begin + i])));
    largest = warp_absmax(largest);
    if (is_short && largest < kLeastAbsmax) largest = kLeastAbsmax;
    const float factor = four_bit_factor(largest);
    const auto code_of = [&](int64_t i) {
      if (i >= n) return four_bit_code(table, 0);
      const float value = Source::widen(values[begin + i]);
      return four_bit_code(table, clamp_to_one(is_short ? value / largest : value * factor));
    };
    for (int64_t i = 2 * lane; i < n; i += 2 * kWarp)
      packed[(begin + i) / 2] = static_cast<uint8_t>((code_of(i) << 4) | code_of(i + 1));
    if (lane == 0) absmax[block] = largest;
  }
}

// One thread per byte of codes.
template <class To>
__global__ void dequantize_4bit_kernel(const uint8_t* packed, const float* absmax, int64_t numel,
                                       FourBitCode code, int64_t blocksize,
                                       typename To::Storage* values) {
  __shared__ FourBitTable table;
  copy_table(code, table);
  for (int64_t at = first_index(); at < (numel + 1) / 2; at += index_stride()) {
    const float scale = absmax[2 * at / blocksize];
    values[2 * at] = To::round(table.values[packed[at] >> 4] * scale);
    if (2 * at + 1 < numel) values[2 * at + 1] = To::round(table.values[packed[at] & 15] * scale);
  }
}

__global__ void dequantize_absmax_kernel(const uint8_t* codes, const float* nested, float offset,
                                         int64_t skip, int64_t n, float* absmax) {
  __shared__ float map[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) map[i] = kAbsmaxMap.values[i];
  __syncthreads();
  for (int64_t i = first_index(); i < n; i += index_stride())
    absmax[i] = absmax_value(map[codes[i]], nested[(skip + i) / kAbsmaxBlock], offset);
}

// One thread block per row.
template <class Source>
__global__ void quantize_int8_kernel(const typename Source::Storage* values, int64_t rows,
                                     int64_t columns, int8_t* codes, float* absmax) {
  __shared__ uint32_t shared;
  const auto half = [&](int64_t i) { return as_half<Source>(values[i]); };
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    if (threadIdx.x == 0) shared = 0;
    __syncthreads();
    const int64_t begin = row * columns;
    float largest = 0;
    for (int64_t i = threadIdx.x; i < columns; i += blockDim.x)
      largest = larger(largest, magnitude(half(begin + i)));
    largest = warp_absmax(largest);
    if (threadIdx.x % kWarp == 0) atomicMax(&shared, float_bits(largest));
    __syncthreads();
    largest = bits_float(shared);
    for (int64_t i = threadIdx.x; i < columns; i += blockDim.x)
      codes[begin + i] = int8_code(half(begin + i), largest);
    if (threadIdx.x == 0) absmax[row] = largest;
    __syncthreads();
  }
}

template <class To>
struct DequantizeInt8Body {
  const int8_t* codes;
  const float* absmax;
  int64_t columns, skip;
  typename To::Storage* values;
  __device__ void operator()(int64_t i) const {
    values[i] = To::round(int8_value(codes[i], absmax[(skip + i) / columns]));
  }
};

template <class Body>
int with_source(FoldType type, const Body& body) {
  if (type == FoldType::kF32) return body(F32Source{});
  if (type == FoldType::kBf16) return body(Bf16Source{});
  return body(F16Source{});
}
template <class Body>
int with_store(FoldType type, const Body& body) {
  if (type == FoldType::kF32) return body(ToF32{});
  if (type == FoldType::kBf16) return body(ToBf16{});
  return body(ToF16{});
}
cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

int launch_quantize_4bit(const void* values, FoldType type, int64_t numel, FourBitCode code,
                         int64_t blocksize, uint8_t* packed, float* absmax, void* stream) {
  if (numel == 0) return cudaSuccess;
  return with_source(type, [&](auto source) -> int {
    using Source = decltype(source);
    const int blocks = blocks_for((numel + blocksize - 1) / blocksize, kThreads / kWarp);
    quantize_4bit_kernel<Source><<<blocks, kThreads, 0, stream_of(stream)>>>(
        static_cast<const typename Source::Storage*>(values), numel, code, blocksize, packed,
        absmax);
    return cudaGetLastError();
  });
}

int launch_dequantize_4bit(const uint8_t* packed, const float* absmax, int64_t numel,
                           FourBitCode code, int64_t blocksize, void* values, FoldType type,
                           void* stream) {
  if (numel == 0) return cudaSuccess;
  return with_store(type, [&](auto store) -> int {
    using To = decltype(store);
    const int blocks = blocks_for((numel + 1) / 2, kThreads);
    dequantize_4bit_kernel<To><<<blocks, kThreads, 0, stream_of(stream)>>>(
        packed, absmax, numel, code, blocksize, static_cast<typename To::Storage*>(values));
    return cudaGetLastError();
  });
}

int launch_dequantize_absmax(const uint8_t* codes, const float* nested_absmax, float offset,
                             int64_t skip, int64_t n, float* absmax, void* stream) {
  if (n == 0) return cudaSuccess;
  dequantize_absmax_kernel<<<blocks_for(n, kThreads), kThreads, 0, stream_of(stream)>>>(
      codes, nested_absmax, offset, skip, n, absmax);
  return cudaGetLastError();
}

int launch_quantize_int8(const void* values, FoldType type, int64_t rows, int64_t columns,
                         int8_t* codes, float* absmax, void* stream) {
  if (rows == 0) return cudaSuccess;
  return with_source(type, [&](auto source) -> int {
    using Source = decltype(source);
    quantize_int8_kernel<Source><<<blocks_for(rows, 1), kThreads, 0, stream_of(stream)>>>(
        static_cast<const typename Source::Storage*>(values), rows, columns, codes, absmax);
    return cudaGetLastError();
  });
}

int launch_dequantize_int8(const int8_t* codes, const float* absmax, int64_t columns, int64_t skip,
                           int64_t numel, void* values, FoldType type, void* stream) {
  return with_store(type, [&](auto store) -> int {
    using To = decltype(store);
    return for_each(numel, stream,
                    DequantizeInt8Body<To>{codes, absmax, columns, skip,
                                           static_cast<typename To::Storage*>(values)});
  });
}

}  // namespace fsdp::kernels
