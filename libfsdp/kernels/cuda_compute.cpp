// Memory and arithmetic on a CUDA device. Not yet run on one: see docs/status.md.
#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <mutex>

#include "libfsdp/base/error.h"
#include "libfsdp/device/cuda_loader.h"
#include "libfsdp/device/cuda_objects.h"
#include "libfsdp/kernels/device_compute.h"
#include "libfsdp/kernels/fold_type.h"
#include "libfsdp/kernels/split_master.h"

namespace fsdp::kernels {
namespace {

using device::check_cuda;

constexpr size_t kPage = 4096;
constexpr int64_t kStagingNumel = int64_t{1}
                                  << 20;  // Elements that go to or from the host at once.

// What add_gradient_sums of the device adds to, and what comes back from it.
struct DeviceSums {
  std::array<int64_t, kExactSumLimbs> limbs;
  int64_t non_finite;
  float max_abs;
};

class CudaCopyStream final : public CopyStream {
 public:
  explicit CudaCopyStream(void* compute) : compute_(compute) {}

  ComputeMemory allocate_host(size_t bytes, std::string_view) override {
    auto buffer = std::make_shared<device::PinnedBuffer>(bytes);
    std::byte* const begin = buffer->data();
    if (bytes > 0) std::memset(begin, 0, bytes);
    return {std::move(buffer), begin};
  }
  uint64_t begin(void* to, const void* from, size_t bytes) override {
    device::record_event(before_.get(), compute_);
    stream_.wait(before_);
    if (bytes > 0) device::copy_async(to, from, bytes, stream_);
    ++copies_;
    event_of(copies_).record(stream_);
    return copies_;
  }
  // An event that has been used again is of a later copy: then more is waited for, never less.
  void order(uint64_t copy) override {
    if (copy != 0) device::wait_event(compute_, event_of(copy).get());
  }
  void synchronize() override { stream_.synchronize(); }

 private:
  const device::CudaEvent& event_of(uint64_t copy) const { return events_[copy % events_.size()]; }

  void* compute_;
  device::CudaStream stream_;
  device::CudaEvent before_;
  std::array<device::CudaEvent, 64> events_;
  uint64_t copies_ = 0;
};

class CudaCompute final : public Compute {
 public:
  explicit CudaCompute(int device)
      : device_(device),
        runtime_(device::cuda_runtime()),
        kernels_(cuda_kernels()),
        sums_(sizeof(DeviceSums)),
        host_sums_(sizeof(DeviceSums)),
        staging_(kStagingNumel * sizeof(float)) {}

  int device() const override { return runtime_.memory_is_host != 0 ? -1 : device_; }
  void synchronize() override {
    check_cuda(runtime_.synchronize_stream(stream()), "waiting for the device");
  }

  ComputeMemory allocate(size_t bytes, std::string_view) override {
    // cudaMalloc promises 256 bytes only.
    auto buffer = std::make_shared<device::CudaBuffer>(bytes == 0 ? 0 : bytes + kPage);
    const auto begin = reinterpret_cast<uintptr_t>(buffer->data());
    auto* const aligned = reinterpret_cast<std::byte*>((begin + kPage - 1) / kPage * kPage);
    zero(aligned, bytes);
    return {std::move(buffer), aligned};
  }
  std::unique_ptr<CopyStream> make_copy_stream() override {
    return std::make_unique<CudaCopyStream>(stream());
  }
  void zero(void* memory, size_t bytes) override { fill(memory, 0, bytes); }
  void poison(void* memory, size_t bytes) override { fill(memory, 0xff, bytes); }

  void write(void* to, const void* host, size_t bytes) override {
    copy(to, host, bytes);
    synchronize();
  }
  void read(const void* from, void* host, size_t bytes) override {
    copy(host, from, bytes);
    synchronize();
  }

  void write_floats(std::span<const float> host, void* to, DType dtype) override {
    const size_t item = dtype_bytes(dtype);
    for_each_piece(host.size(), [&](size_t at, size_t n) {
      convert_floats(host.data() + at, DType::kF32, staging_.data(), dtype, n);
      write(static_cast<std::byte*>(to) + at * item, staging_.data(), n * item);
    });
  }
  void read_floats(const void* from, DType dtype, std::span<float> host) override {
    const size_t item = dtype_bytes(dtype);
    for_each_piece(host.size(), [&](size_t at, size_t n) {
      read(static_cast<const std::byte*>(from) + at * item, staging_.data(), n * item);
      convert_floats(staging_.data(), dtype, host.data() + at, DType::kF32, n);
    });
  }
  void write_split(std::span<const float> host, uint16_t* high, uint16_t* remainder) override {
    for_each_piece(host.size(), [&](size_t at, size_t n) {
      auto* const halves = reinterpret_cast<uint16_t*>(staging_.data());
      split_master_cpu(host.data() + at, halves, halves + n, static_cast<int64_t>(n));
      copy(high + at, halves, n * sizeof(uint16_t));
      write(remainder + at, halves + n, n * sizeof(uint16_t));
    });
  }
  void read_split(const uint16_t* high, const uint16_t* remainder, std::span<float> host) override {
    for_each_piece(host.size(), [&](size_t at, size_t n) {
      auto* const halves = reinterpret_cast<uint16_t*>(staging_.data());
      copy(halves, high + at, n * sizeof(uint16_t));
      read(remainder + at, halves + n, n * sizeof(uint16_t));
      join_master_cpu(halves, halves + n, host.data() + at, static_cast<int64_t>(n));
    });
  }

  void convert(const float* from, void* to, DType dtype, int64_t n) override {
    check_cuda(kernels_.convert(from, to, fold_type(dtype), n, stream()), "converting parameters");
  }
  void scale(float* values, int64_t n, float factor, float limit) override {
    check_cuda(kernels_.scale(values, n, factor, limit, stream()), "scaling gradients");
  }
  void fold_ranks(float* destination, std::span<const void* const> sources, DType dtype, int64_t n,
                  bool accumulate) override {
    check_cuda(kernels_.fold_ranks(destination, sources.data(), static_cast<int>(sources.size()),
                                   fold_type(dtype), n, accumulate ? 1 : 0, stream()),
               "adding gradients of ranks");
  }
  GradientSums sum_gradients(std::span<const std::span<const float>> gradients,
                             NormType type) override {
    auto* const sums = reinterpret_cast<DeviceSums*>(sums_.data());
    zero(sums, sizeof(DeviceSums));
    for (const std::span<const float> gradient : gradients) {
      check_cuda(kernels_.add_gradient_sums(gradient.data(), static_cast<int64_t>(gradient.size()),
                                            type, sums->limbs.data(), &sums->max_abs,
                                            &sums->non_finite, stream()),
                 "summing gradients");
    }
    read(sums, host_sums_.data(), sizeof(DeviceSums));
    const auto& got = *reinterpret_cast<const DeviceSums*>(host_sums_.data());
    return {.sum = ExactSum::from_limbs(got.limbs),
            .max_abs = got.max_abs,
            .non_finite = got.non_finite};
  }

  void adamw(const ParameterArrays& parameter, const float* gradient, float* exp_avg,
             float* exp_avg_sq, int64_t n, const AdamWScalars& scalars) override {
    check_cuda(kernels_.adamw(&parameter, gradient, exp_avg, exp_avg_sq, n, &scalars, stream()),
               "AdamW");
  }
  void sgd(const ParameterArrays& parameter, const float* gradient, float* buffer, int64_t n,
           bool nesterov, const SgdScalars& scalars) override {
    check_cuda(kernels_.sgd(&parameter, gradient, buffer, n, nesterov ? 1 : 0, &scalars, stream()),
               "SGD");
  }
  void any_precision_adamw(const AnyPrecisionArrays& arrays, int64_t n,
                           const AnyPrecisionScalars& scalars) override {
    check_cuda(kernels_.any_precision_adamw(&arrays, n, &scalars, stream()), "AnyPrecision AdamW");
  }
  void adamw_8bit(const ParameterArrays& parameter, const float* gradient,
                  const QuantizedState& state, int64_t n, const AdamWScalars& scalars) override {
    check_cuda(kernels_.adamw_8bit(&parameter, gradient, &state, n, &scalars, stream()),
               "8-bit AdamW");
  }

  void dequantize_4bit(const uint8_t* packed, const float* absmax, int64_t numel, FourBitCode code,
                       int64_t blocksize, void* values, DType dtype) override {
    check_cuda(kernels_.dequantize_4bit(packed, absmax, numel, code, blocksize, values,
                                        fold_type(dtype), stream()),
               "dequantising 4 bits");
  }
  void dequantize_absmax(const uint8_t* codes, const float* nested_absmax, float offset,
                         int64_t skip, int64_t n, float* absmax) override {
    check_cuda(kernels_.dequantize_absmax(codes, nested_absmax, offset, skip, n, absmax, stream()),
               "dequantising scales");
  }
  void dequantize_int8(const int8_t* codes, const float* absmax, int64_t columns, int64_t skip,
                       int64_t numel, void* values, DType dtype) override {
    check_cuda(kernels_.dequantize_int8(codes, absmax, columns, skip, numel, values,
                                        fold_type(dtype), stream()),
               "dequantising int8");
  }

 private:
  void fill(void* memory, int value, size_t bytes) {
    if (bytes == 0) return;
    check_cuda(runtime_.fill_async(memory, value, bytes, stream()), "filling device memory");
  }
  void copy(void* to, const void* from, size_t bytes) {
    if (bytes == 0) return;
    check_cuda(runtime_.copy_async(to, from, bytes, stream()), "copying to or from the device");
  }
  template <class Body>
  static void for_each_piece(size_t numel, Body body) {
    constexpr auto kPiece = static_cast<size_t>(kStagingNumel);
    for (size_t at = 0; at < numel; at += kPiece) body(at, std::min(kPiece, numel - at));
  }

  int device_;
  const device::CudaRuntimeTable& runtime_;
  const CudaKernelTable& kernels_;
  device::CudaBuffer sums_;
  device::PinnedBuffer host_sums_;
  device::PinnedBuffer staging_;
};

}  // namespace

std::shared_ptr<Compute> make_cuda_compute(int device) {
  if (!device::cuda_status().usable) throw ConfigError(device::cuda_status().reason);
  device::set_cuda_device(device);
  return std::make_shared<CudaCompute>(device);
}

Compute& device_compute(int device) {
  static std::mutex mutex;
  static std::map<int, std::shared_ptr<Compute>> computes;
  const std::lock_guard lock(mutex);
  std::shared_ptr<Compute>& found = computes[device];
  if (!found) found = make_cuda_compute(device);
  return *found;
}

}  // namespace fsdp::kernels
