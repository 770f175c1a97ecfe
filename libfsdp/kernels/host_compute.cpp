#include <algorithm>
#include <cstring>
#include <string>

#include "libfsdp/device/host_arena.h"
#include "libfsdp/kernels/compute.h"
#include "libfsdp/kernels/fold.h"
#include "libfsdp/kernels/quantized_weight.h"
#include "libfsdp/kernels/split_master.h"
#include "libfsdp/kernels/update.h"

namespace fsdp::kernels {
namespace {

constexpr size_t kPage = 4096;

ComputeMemory allocate_arena(size_t bytes, std::string_view label) {
  device::HostArenaOptions options{.label = std::string(label)};
  auto arena = std::make_shared<device::HostArena>(bytes, std::move(options));
  std::byte* const begin = arena->allocate(bytes, kPage);
  return {std::move(arena), begin};
}

class HostCopyStream final : public CopyStream {
 public:
  ComputeMemory allocate_host(size_t bytes, std::string_view label) override {
    return allocate_arena(bytes, label);
  }
  uint64_t begin(void* to, const void* from, size_t bytes) override {
    std::memcpy(to, from, bytes);
    return ++copies_;
  }
  void order(uint64_t) override {}
  void synchronize() override {}

 private:
  uint64_t copies_ = 0;
};

class HostCompute final : public Compute {
 public:
  ComputeMemory allocate(size_t bytes, std::string_view label) override {
    return allocate_arena(bytes, label);
  }
  std::unique_ptr<CopyStream> make_copy_stream() override {
    return std::make_unique<HostCopyStream>();
  }
  void zero(void* memory, size_t bytes) override { std::memset(memory, 0, bytes); }
  void poison(void* memory, size_t bytes) override { device::poison(memory, bytes); }

  void write(void* to, const void* host, size_t bytes) override { std::memcpy(to, host, bytes); }
  void read(const void* from, void* host, size_t bytes) override { std::memcpy(host, from, bytes); }
  void write_floats(std::span<const float> host, void* to, DType dtype) override {
    convert_floats(host.data(), DType::kF32, to, dtype, host.size());
  }
  void read_floats(const void* from, DType dtype, std::span<float> host) override {
    convert_floats(from, dtype, host.data(), DType::kF32, host.size());
  }
  void write_split(std::span<const float> host, uint16_t* high, uint16_t* remainder) override {
    split_master_cpu(host.data(), high, remainder, static_cast<int64_t>(host.size()));
  }
  void read_split(const uint16_t* high, const uint16_t* remainder, std::span<float> host) override {
    join_master_cpu(high, remainder, host.data(), static_cast<int64_t>(host.size()));
  }

  void convert(const float* from, void* to, DType dtype, int64_t n) override {
    convert_floats(from, DType::kF32, to, dtype, static_cast<size_t>(n));
  }
  void scale(float* values, int64_t n, float factor, float limit) override {
    for (int64_t i = 0; i < n; ++i) values[i] = std::clamp(values[i] * factor, -limit, limit);
  }
  void fold_ranks(float* destination, std::span<const void* const> sources, DType dtype, int64_t n,
                  bool accumulate) override {
    kernels::fold_ranks(destination, sources, dtype, n, accumulate);
  }
  GradientSums sum_gradients(std::span<const std::span<const float>> gradients,
                             NormType type) override {
    GradientSums sums;
    for (const std::span<const float> gradient : gradients)
      add_gradient_sums(gradient.data(), static_cast<int64_t>(gradient.size()), type, sums);
    return sums;
  }

  void adamw(const ParameterArrays& parameter, const float* gradient, float* exp_avg,
             float* exp_avg_sq, int64_t n, const AdamWScalars& scalars) override {
    kernels::adamw(parameter, gradient, exp_avg, exp_avg_sq, n, scalars);
  }
  void sgd(const ParameterArrays& parameter, const float* gradient, float* buffer, int64_t n,
           bool nesterov, const SgdScalars& scalars) override {
    kernels::sgd(parameter, gradient, buffer, n, nesterov, scalars);
  }
  void any_precision_adamw(const AnyPrecisionArrays& arrays, int64_t n,
                           const AnyPrecisionScalars& scalars) override {
    kernels::any_precision_adamw(arrays, n, scalars);
  }
  void adamw_8bit(const ParameterArrays& parameter, const float* gradient,
                  const QuantizedState& state, int64_t n, const AdamWScalars& scalars) override {
    kernels::adamw_8bit(parameter, gradient, state, n, scalars);
  }

  void dequantize_4bit(const uint8_t* packed, const float* absmax, int64_t numel, FourBitCode code,
                       int64_t blocksize, void* values, DType dtype) override {
    kernels::dequantize_4bit(packed, absmax, numel, code, blocksize, values, dtype);
  }
  void dequantize_absmax(const uint8_t* codes, const float* nested_absmax, float offset,
                         int64_t skip, int64_t n, float* absmax) override {
    kernels::dequantize_absmax(codes, nested_absmax, offset, skip, n, absmax);
  }
  void dequantize_int8(const int8_t* codes, const float* absmax, int64_t columns, int64_t skip,
                       int64_t numel, void* values, DType dtype) override {
    kernels::dequantize_int8(codes, absmax, columns, skip, numel, values, dtype);
  }
};

}  // namespace

Compute& host_compute() {
  static HostCompute compute;
  return compute;
}

}  // namespace fsdp::kernels
