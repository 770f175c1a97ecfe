#include <cmath>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/kernels/cuda_kernel_table.h"
#include "libfsdp/kernels/fold.h"
#include "libfsdp/kernels/split_master.h"
#include "libfsdp/kernels/square_sum.h"
#include "libfsdp/kernels/update.h"
#include "tests/gpu/device_data.h"
#include "tests/unit/kernels/random_floats.h"

namespace fsdp::kernels {
namespace {

using device::check_cuda;
using device::DeviceArray;
using device::same_bits;

constexpr int64_t kNumel = 300000 * 4 + 17;  // more than one round of the grid, and a tail
constexpr int64_t kQuanta = 140001;  // more than one round, and a last block that is not full

constexpr AdamWScalars kAdamW{.grad_scale = 0.37F,
                              .clip_value = INFINITY,
                              .decay = 0.9999F,
                              .one_minus_beta1 = 0.1F,
                              .beta2 = 0.999F,
                              .one_minus_beta2 = 0.001F,
                              .step_size = 0.0123F,
                              .bias_correction2_sqrt = 0.0547F,
                              .epsilon = 1e-8F};
constexpr SgdScalars kSgd{.grad_scale = 0.37F,
                          .clip_value = INFINITY,
                          .weight_decay = 0.01F,
                          .learning_rate = 0.1F,
                          .momentum = 0.9F};

struct HostState {
  std::vector<float> master = random_floats(kNumel, 1);
  std::vector<float> gradient = random_floats(kNumel, 2);
  std::vector<float> first = random_floats(kNumel, 3);
  std::vector<float> second = random_floats(kNumel, 4);
  std::vector<uint16_t> high = std::vector<uint16_t>(kNumel);
  std::vector<uint16_t> remainder = std::vector<uint16_t>(kNumel);
  HostState() {
    for (float& value : second) value = std::fabs(value);
    split_master_cpu(master.data(), high.data(), remainder.data(), kNumel);
  }
};

struct DeviceState {
  DeviceArray<float> master, gradient, first, second;
  DeviceArray<uint16_t> high, remainder;
  DeviceState(const HostState& host, const device::CudaStream& stream)
      : master(host.master, stream),
        gradient(host.gradient, stream),
        first(host.first, stream),
        second(host.second, stream),
        high(host.high, stream),
        remainder(host.remainder, stream) {}
};

class CudaKernelsTest : public device::GpuTest {};

TEST_F(CudaKernelsTest, SplitAndJoinEqualTheirTwins) {
  const device::CudaStream stream;
  HostState host;
  for (const uint32_t edge : {0x7f800000U, 0xff800000U, 0x7fffffffU, 0x7f7fffffU, 0x7f800001U}) {
    host.master[edge % 1000] = bits_float(edge);
  }
  split_master_cpu(host.master.data(), host.high.data(), host.remainder.data(), kNumel);
  const DeviceArray<float> master(host.master, stream);
  const DeviceArray<uint16_t> high(std::vector<uint16_t>(kNumel), stream);
  const DeviceArray<uint16_t> remainder(std::vector<uint16_t>(kNumel), stream);
  check_cuda(cuda_kernels().split_master(master.data(), high.data(), remainder.data(), kNumel,
                                         stream.get()),
             "split");
  EXPECT_TRUE(same_bits(high.to_host(), host.high));
  EXPECT_TRUE(same_bits(remainder.to_host(), host.remainder));
  std::vector<float> joined(kNumel);
  join_master_cpu(host.high.data(), host.remainder.data(), joined.data(), kNumel);
  check_cuda(cuda_kernels().join_master(high.data(), remainder.data(), master.data(), kNumel,
                                        stream.get()),
             "join");
  EXPECT_TRUE(same_bits(master.to_host(), joined));
}

TEST_F(CudaKernelsTest, FoldsEqualTheirTwins) {
  const device::CudaStream stream;
  const std::pair<DType, FoldType> types[] = {{DType::kF32, FoldType::kF32},
                                              {DType::kBF16, FoldType::kBf16},
                                              {DType::kF16, FoldType::kF16}};
  for (const auto& [dtype, type] : types) {
    for (const int count : {0, 1, 3, 70}) {
      for (const bool accumulate : {false, true}) {
        constexpr int64_t kFoldNumel = 12800;
        std::vector<std::vector<std::byte>> stored;
        std::vector<DeviceArray<std::byte>> on_device;
        std::vector<const void*> host_sources;
        std::vector<const void*> device_sources;
        for (int k = 0; k < count; ++k) {
          const std::vector<float> values = random_floats(kFoldNumel, static_cast<uint64_t>(k));
          stored.emplace_back(values.size() * dtype_bytes(dtype));
          convert_floats(values.data(), DType::kF32, stored.back().data(), dtype, values.size());
          on_device.emplace_back(stored.back(), stream);
        }
        for (const auto& bytes : stored) host_sources.push_back(bytes.data());
        for (const auto& array : on_device) device_sources.push_back(array.data());
        std::vector<float> expected = random_floats(kFoldNumel, 1000);
        const DeviceArray<float> destination(expected, stream);
        fold_ranks(expected.data(), host_sources, dtype, kFoldNumel, accumulate);
        check_cuda(cuda_kernels().fold_ranks(destination.data(), device_sources.data(), count, type,
                                             kFoldNumel, accumulate ? 1 : 0, stream.get()),
                   "fold");
        EXPECT_TRUE(same_bits(destination.to_host(), expected))
            << dtype_name(dtype) << ' ' << count << accumulate;
      }
    }
  }
}

TEST_F(CudaKernelsTest, SquareSumsEqualTheirTwins) {
  const device::CudaStream stream;
  std::vector<float> values = random_floats(kQuanta * kQuantum, 5);
  values[1000] = INFINITY;
  values[kQuanta * kQuantum - 1] = NAN;
  std::vector<double> expected(kQuanta);
  const int64_t non_finite =
      quantum_square_sums(values.data(), kQuanta * kQuantum, expected.data());
  SquareSum total;
  add_square_sums(values.data(), kQuanta * kQuantum, total);

  const DeviceArray<float> input(values, stream);
  const DeviceArray<double> sums(std::vector<double>(kQuanta), stream);
  const DeviceArray<int64_t> limbs(std::vector<int64_t>(kExactSumLimbs), stream);
  const DeviceArray<int64_t> counts(std::vector<int64_t>(2), stream);
  check_cuda(cuda_kernels().quantum_square_sums(input.data(), kQuanta * kQuantum, sums.data(),
                                                counts.data(), stream.get()),
             "quantum sums");
  check_cuda(cuda_kernels().add_square_sums(input.data(), kQuanta * kQuantum, limbs.data(),
                                            counts.data() + 1, stream.get()),
             "exact sum");
  EXPECT_TRUE(same_bits(sums.to_host(), expected));
  EXPECT_EQ(counts.to_host(), (std::vector<int64_t>{non_finite, non_finite}));
  ExactSum::Limbs packet;
  const std::vector<int64_t> got = limbs.to_host();
  std::copy(got.begin(), got.end(), packet.begin());
  EXPECT_EQ(ExactSum::from_limbs(packet), total.sum);
}

TEST_F(CudaKernelsTest, AdamwEqualsItsTwin) {
  const device::CudaStream stream;
  HostState host;
  const DeviceState plain(host, stream);
  const DeviceState split(host, stream);
  for (int step = 0; step < 3; ++step) {
    check_cuda(
        cuda_kernels().adamw_f32(plain.master.data(), plain.gradient.data(), plain.first.data(),
                                 plain.second.data(), kNumel, &kAdamW, stream.get()),
        "adamw");
    check_cuda(cuda_kernels().adamw_split(split.high.data(), split.remainder.data(),
                                          split.gradient.data(), split.first.data(),
                                          split.second.data(), kNumel, &kAdamW, stream.get()),
               "adamw, split");
    adamw_f32(host.master.data(), host.gradient.data(), host.first.data(), host.second.data(),
              kNumel, kAdamW);
  }
  split_master_cpu(host.master.data(), host.high.data(), host.remainder.data(), kNumel);
  EXPECT_TRUE(same_bits(plain.master.to_host(), host.master));
  EXPECT_TRUE(same_bits(plain.first.to_host(), host.first));
  EXPECT_TRUE(same_bits(plain.second.to_host(), host.second));
  EXPECT_TRUE(same_bits(split.high.to_host(), host.high));
  EXPECT_TRUE(same_bits(split.remainder.to_host(), host.remainder));
}

TEST_F(CudaKernelsTest, SgdEqualsItsTwin) {
  const device::CudaStream stream;
  for (const bool with_momentum : {false, true}) {
    for (const bool nesterov : {false, true}) {
      if (nesterov && !with_momentum) continue;
      HostState host;
      const DeviceState plain(host, stream);
      const DeviceState split(host, stream);
      for (int step = 0; step < 3; ++step) {
        check_cuda(cuda_kernels().sgd_f32(plain.master.data(), plain.gradient.data(),
                                          with_momentum ? plain.first.data() : nullptr, kNumel,
                                          nesterov ? 1 : 0, &kSgd, stream.get()),
                   "sgd");
        check_cuda(cuda_kernels().sgd_split(split.high.data(), split.remainder.data(),
                                            split.gradient.data(),
                                            with_momentum ? split.first.data() : nullptr, kNumel,
                                            nesterov ? 1 : 0, &kSgd, stream.get()),
                   "sgd, split");
        sgd_f32(host.master.data(), host.gradient.data(),
                with_momentum ? host.first.data() : nullptr, kNumel, nesterov, kSgd);
      }
      split_master_cpu(host.master.data(), host.high.data(), host.remainder.data(), kNumel);
      EXPECT_TRUE(same_bits(plain.master.to_host(), host.master)) << with_momentum << nesterov;
      EXPECT_TRUE(same_bits(plain.first.to_host(), host.first)) << with_momentum << nesterov;
      EXPECT_TRUE(same_bits(split.high.to_host(), host.high)) << with_momentum << nesterov;
      EXPECT_TRUE(same_bits(split.remainder.to_host(), host.remainder))
          << with_momentum << nesterov;
    }
  }
}

}  // namespace
}  // namespace fsdp::kernels
