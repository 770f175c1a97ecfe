// Memory and arithmetic of one rank, where its shards live: in host memory, or on a CUDA device.
// Engine and optimizers use nothing else to touch what they own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "libfsdp/base/dtype.h"
#include "libfsdp/kernels/any_precision.h"
#include "libfsdp/kernels/four_bit.h"
#include "libfsdp/kernels/gradient_sums.h"
#include "libfsdp/kernels/parameter_forms.h"
#include "libfsdp/kernels/quantized_state.h"

namespace fsdp::kernels {

/// A block of memory; aliases of it keep the whole block.
using ComputeMemory = std::shared_ptr<std::byte>;

/// Copies between a Compute's memory and the host's, one after the other, beside what the Compute
/// does. Used by one thread at a time; its Compute outlives it.
class CopyStream {
 public:
  virtual ~CopyStream() = default;
  /// Host memory for the host's end of copies, page-locked where that matters; else as
  /// Compute::allocate().
  virtual ComputeMemory allocate_host(size_t bytes, std::string_view label) = 0;
  /// Begins a copy, which happens after what its Compute was called for before and after the copies
  /// before. Returns its number, above 0.
  virtual uint64_t begin(void* to, const void* from, size_t bytes) = 0;
  /// What the Compute is called for from now on finds this copy done; 0 = none.
  virtual void order(uint64_t copy) = 0;
  /// Blocks until all copies are done.
  virtual void synchronize() = 0;
};

/// One rank's memory and what is done with it, in the order of the calls.
///
/// Pointers are to this Compute's memory unless said otherwise. Calls that do not bring something
/// to the host may return before they have happened (on a device: enqueued on stream()); what comes
/// later on the same stream finds them done. The bits are the same everywhere. One virtual call
/// covers a whole range. Used by one thread at a time. Throws DeviceMemoryError, HostResourceError
/// (no room), InternalError (CUDA failed).
class Compute {
 public:
  virtual ~Compute() = default;

  /// The CUDA device whose memory this is; -1 = memory that the host reads and writes.
  virtual int device() const { return -1; }
  /// The cudaStream_t that the calls, and the model, run on; null on the host.
  virtual void* stream() const { return nullptr; }
  /// Blocks until all calls have happened.
  virtual void synchronize() {}

  /// `bytes` (may be 0), 4096-byte aligned, zero.
  virtual ComputeMemory allocate(size_t bytes, std::string_view label) = 0;
  virtual std::unique_ptr<CopyStream> make_copy_stream() = 0;
  virtual void zero(void* memory, size_t bytes) = 0;
  /// Makes every float in it NaN.
  virtual void poison(void* memory, size_t bytes) = 0;

  /// To and from host memory, which may be used again on return.
  virtual void write(void* to, const void* host, size_t bytes) = 0;
  virtual void read(const void* from, void* host, size_t bytes) = 0;
  /// Host floats into elements of `dtype` and back, as convert_floats().
  virtual void write_floats(std::span<const float> host, void* to, DType dtype) = 0;
  virtual void read_floats(const void* from, DType dtype, std::span<float> host) = 0;
  /// Host floats into a split master and back, as split_master_cpu().
  virtual void write_split(std::span<const float> host, uint16_t* high, uint16_t* remainder) = 0;
  virtual void read_split(const uint16_t* high, const uint16_t* remainder,
                          std::span<float> host) = 0;

  /// to[i] = from[i] as `dtype` (f32, bf16, f16), to nearest even.
  virtual void convert(const float* from, void* to, DType dtype, int64_t n) = 0;
  /// values[i] = values[i] * factor, clamped to [-limit, limit].
  virtual void scale(float* values, int64_t n, float factor, float limit) = 0;
  /// As fold_ranks(); `sources` is host memory.
  virtual void fold_ranks(float* destination, std::span<const void* const> sources, DType dtype,
                          int64_t n, bool accumulate) = 0;
  /// As add_gradient_sums() over all ranges, from zero. Blocks.
  virtual GradientSums sum_gradients(std::span<const std::span<const float>> gradients,
                                     NormType type) = 0;

  // As the functions of update.h.
  virtual void adamw(const ParameterArrays& parameter, const float* gradient, float* exp_avg,
                     float* exp_avg_sq, int64_t n, const AdamWScalars& scalars) = 0;
  virtual void sgd(const ParameterArrays& parameter, const float* gradient, float* buffer,
                   int64_t n, bool nesterov, const SgdScalars& scalars) = 0;
  virtual void any_precision_adamw(const AnyPrecisionArrays& arrays, int64_t n,
                                   const AnyPrecisionScalars& scalars) = 0;
  virtual void adamw_8bit(const ParameterArrays& parameter, const float* gradient,
                          const QuantizedState& state, int64_t n, const AdamWScalars& scalars) = 0;

  // As the functions of quantized_weight.h.
  virtual void dequantize_4bit(const uint8_t* packed, const float* absmax, int64_t numel,
                               FourBitCode code, int64_t blocksize, void* values, DType dtype) = 0;
  virtual void dequantize_absmax(const uint8_t* codes, const float* nested_absmax, float offset,
                                 int64_t skip, int64_t n, float* absmax) = 0;
  virtual void dequantize_int8(const int8_t* codes, const float* absmax, int64_t columns,
                               int64_t skip, int64_t numel, void* values, DType dtype) = 0;
};

/// Host memory and the CPU's loops; everything has happened when a call returns. One for the
/// process; unlike others it may be used by several threads at a time.
Compute& host_compute();

/// Memory of CUDA device `device`, which becomes current for the calling thread, and the kernels of
/// libfsdp_cuda.so. The stream is the device's default stream, as LibTorch's own unless somebody
/// changes that. Throws ConfigError where CUDA cannot be used.
std::shared_ptr<Compute> make_cuda_compute(int device);

}  // namespace fsdp::kernels
