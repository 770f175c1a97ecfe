#include <cmath>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/kernels/cuda_kernel_table.h"
#include "libfsdp/kernels/fold.h"
#include "libfsdp/kernels/gradient_sums.h"
#include "libfsdp/kernels/quantized_weight.h"
#include "libfsdp/kernels/split_master.h"
#include "tests/gpu/device_data.h"
#include "tests/unit/kernels/random_floats.h"
#include "tests/unit/kernels/update_cases.h"

namespace fsdp::kernels {
namespace {

using device::check_cuda;
using device::DeviceArray;
using device::same_bits;

constexpr int64_t kNumel = 300000 * 4 + 17;  // more than one round of the grid, and a tail
constexpr int64_t kQuanta = 140001;  // more than one round, and a last block that is not full

/// The twin of an UpdateState on the device.
struct DeviceState {
  DeviceArray<float> master, gradient, first, second;
  DeviceArray<uint16_t> high, remainder, copy;
  DeviceState(const UpdateState& host, const device::CudaStream& stream)
      : master(host.master, stream),
        gradient(host.gradient, stream),
        first(host.first, stream),
        second(host.second, stream),
        high(host.high, stream),
        remainder(host.remainder, stream),
        copy(host.copy, stream) {}

  /// As those of the host, with the device's memory.
  ParameterArrays arrays(const ParameterArrays& host) const {
    ParameterArrays arrays = host;
    if (host.master != nullptr) arrays.master = master.data();
    if (host.high != nullptr) arrays.high = high.data();
    if (host.remainder != nullptr) arrays.remainder = remainder.data();
    if (host.copy != nullptr) arrays.copy = copy.data();
    return arrays;
  }
  void expect_equal(const UpdateState& host) const {
    EXPECT_TRUE(same_bits(master.to_host(), host.master));
    EXPECT_TRUE(same_bits(first.to_host(), host.first));
    EXPECT_TRUE(same_bits(second.to_host(), host.second));
    EXPECT_TRUE(same_bits(high.to_host(), host.high));
    EXPECT_TRUE(same_bits(remainder.to_host(), host.remainder));
    EXPECT_TRUE(same_bits(copy.to_host(), host.copy));
  }
};

class CudaKernelsTest : public device::GpuTest {};

TEST_F(CudaKernelsTest, SplitAndJoinEqualTheirTwins) {
  const device::CudaStream stream;
  UpdateState host(kNumel);
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

TEST_F(CudaKernelsTest, GradientSumsEqualTheirTwins) {
  const device::CudaStream stream;
  std::vector<float> values = random_floats(kQuanta * kQuantum, 5);
  values[1000] = INFINITY;
  values[kQuanta * kQuantum - 1] = NAN;
  const DeviceArray<float> input(values, stream);
  for (const NormType type : {NormType::kTwo, NormType::kOne, NormType::kInf}) {
    SCOPED_TRACE(static_cast<int>(type));
    GradientSums total;
    add_gradient_sums(values.data(), kQuanta * kQuantum, type, total);
    const DeviceArray<int64_t> limbs(std::vector<int64_t>(kExactSumLimbs), stream);
    const DeviceArray<float> max_abs(std::vector<float>(1), stream);
    const DeviceArray<int64_t> count(std::vector<int64_t>(1), stream);
    check_cuda(
        cuda_kernels().add_gradient_sums(input.data(), kQuanta * kQuantum, type, limbs.data(),
                                         max_abs.data(), count.data(), stream.get()),
        "gradient sums");
    ExactSum::Limbs packet;
    const std::vector<int64_t> got = limbs.to_host();
    std::copy(got.begin(), got.end(), packet.begin());
    EXPECT_EQ(ExactSum::from_limbs(packet), total.sum);
    EXPECT_EQ(max_abs.to_host()[0], total.max_abs);
    EXPECT_EQ(count.to_host()[0], total.non_finite);
    if (type == NormType::kInf) continue;
    std::vector<double> expected(kQuanta);
    quantum_sums(values.data(), kQuanta * kQuantum, type, expected.data());
    const DeviceArray<double> sums(std::vector<double>(kQuanta), stream);
    check_cuda(cuda_kernels().quantum_sums(input.data(), kQuanta * kQuantum, type, sums.data(),
                                           count.data(), stream.get()),
               "quantum sums");
    EXPECT_TRUE(same_bits(sums.to_host(), expected));
  }
}

TEST_F(CudaKernelsTest, AdamwEqualsItsTwin) {
  const device::CudaStream stream;
  for (const ParameterForm form : kForms) {
    SCOPED_TRACE(static_cast<int>(form));
    UpdateState host(kNumel);
    const DeviceState on_device(host, stream);
    const ParameterArrays arrays = on_device.arrays(host.arrays(form));
    for (int step = 0; step < 3; ++step) {
      check_cuda(cuda_kernels().adamw(&arrays, on_device.gradient.data(), on_device.first.data(),
                                      on_device.second.data(), kNumel, &kAdamW, stream.get()),
                 "adamw");
      adamw(host.arrays(form), host.gradient.data(), host.first.data(), host.second.data(), kNumel,
            kAdamW);
    }
    on_device.expect_equal(host);
  }
}

TEST_F(CudaKernelsTest, SgdEqualsItsTwin) {
  const device::CudaStream stream;
  for (const ParameterForm form : kForms) {
    for (const auto& [momentum, nesterov] :
         {std::pair(false, false), std::pair(true, false), std::pair(true, true)}) {
      SCOPED_TRACE(testing::Message() << static_cast<int>(form) << momentum << nesterov);
      UpdateState host(kNumel);
      const DeviceState on_device(host, stream);
      const ParameterArrays arrays = on_device.arrays(host.arrays(form));
      for (int step = 0; step < 3; ++step) {
        check_cuda(cuda_kernels().sgd(&arrays, on_device.gradient.data(),
                                      momentum ? on_device.first.data() : nullptr, kNumel,
                                      nesterov ? 1 : 0, &kSgd, stream.get()),
                   "sgd");
        sgd(host.arrays(form), host.gradient.data(), momentum ? host.first.data() : nullptr, kNumel,
            nesterov, kSgd);
      }
      on_device.expect_equal(host);
    }
  }
}

TEST_F(CudaKernelsTest, AnyPrecisionEqualsItsTwin) {
  const device::CudaStream stream;
  for (const AnyPrecisionCase& test_case : any_precision_cases()) {
    AnyPrecisionState host(test_case, kNumel);
    const DeviceArray<float> gradient(host.gradient, stream);
    std::vector<DeviceArray<std::byte>> arrays;
    for (const auto& bytes : host.arrays) arrays.emplace_back(bytes, stream);
    AnyPrecisionArrays on_device = host.pointers(test_case);
    on_device.gradient = gradient.data();
    on_device.parameter = arrays[0].data();
    on_device.exp_avg = arrays[1].data();
    on_device.exp_avg_sq = arrays[2].data();
    if (on_device.compensation != nullptr) on_device.compensation = arrays[3].data();
    for (int step = 0; step < 3; ++step) {
      check_cuda(
          cuda_kernels().any_precision_adamw(&on_device, kNumel, &kAnyPrecision, stream.get()),
          "any precision");
      any_precision_adamw(host.pointers(test_case), kNumel, kAnyPrecision);
    }
    for (size_t i = 0; i < arrays.size(); ++i)
      EXPECT_TRUE(arrays[i].to_host() == host.arrays[i]) << test_case.name << " array " << i;
  }
}

TEST_F(CudaKernelsTest, Adamw8bitEqualsItsTwin) {
  const device::CudaStream stream;
  for (const ParameterForm form : kForms) {
    SCOPED_TRACE(static_cast<int>(form));
    UpdateState host(kNumel);
    QuantizedArrays state(kNumel);
    const DeviceState on_device(host, stream);
    const DeviceArray<uint8_t> code1(state.code1, stream);
    const DeviceArray<uint8_t> code2(state.code2, stream);
    const DeviceArray<float> absmax1(state.absmax1, stream);
    const DeviceArray<float> absmax2(state.absmax2, stream);
    const QuantizedState device_state{code1.data(), absmax1.data(), code2.data(), absmax2.data()};
    const ParameterArrays arrays = on_device.arrays(host.arrays(form));
    for (int step = 0; step < 3; ++step) {
      check_cuda(cuda_kernels().adamw_8bit(&arrays, on_device.gradient.data(), &device_state,
                                           kNumel, &kAdamW, stream.get()),
                 "adamw, 8 bit");
      adamw_8bit(host.arrays(form), host.gradient.data(), state.pointers(), kNumel, kAdamW);
    }
    on_device.expect_equal(host);
    EXPECT_TRUE(same_bits(code1.to_host(), state.code1));
    EXPECT_TRUE(same_bits(code2.to_host(), state.code2));
    EXPECT_TRUE(same_bits(absmax1.to_host(), state.absmax1));
    EXPECT_TRUE(same_bits(absmax2.to_host(), state.absmax2));
  }
}

TEST_F(CudaKernelsTest, FourBitWeightsEqualTheirTwins) {
  const device::CudaStream stream;
  const CudaKernelTable& table = cuda_kernels();
  const std::vector<float> host = random_floats(kNumel, 5);
  const DeviceArray<float> values(host, stream);
  for (const FourBitCode code : {FourBitCode::kNf4, FourBitCode::kFp4}) {
    for (const int64_t blocksize : {int64_t{64}, int64_t{32}, int64_t{4096}}) {
      std::vector<uint8_t> packed((kNumel + 1) / 2);
      std::vector<float> absmax(static_cast<size_t>((kNumel + blocksize - 1) / blocksize));
      const DeviceArray<uint8_t> packed_there(packed, stream);
      const DeviceArray<float> absmax_there(absmax, stream);
      quantize_4bit(host.data(), DType::kF32, kNumel, code, blocksize, packed.data(),
                    absmax.data());
      check_cuda(table.quantize_4bit(values.data(), FoldType::kF32, kNumel, code, blocksize,
                                     packed_there.data(), absmax_there.data(), stream.get()),
                 "quantize");
      EXPECT_TRUE(same_bits(packed_there.to_host(), packed));
      EXPECT_TRUE(same_bits(absmax_there.to_host(), absmax));
      std::vector<uint16_t> read(kNumel);
      const DeviceArray<uint16_t> read_there(read, stream);
      dequantize_4bit(packed.data(), absmax.data(), kNumel, code, blocksize, read.data(),
                      DType::kBF16);
      check_cuda(table.dequantize_4bit(packed_there.data(), absmax_there.data(), kNumel, code,
                                       blocksize, read_there.data(), FoldType::kBf16, stream.get()),
                 "dequantize");
      EXPECT_TRUE(same_bits(read_there.to_host(), read));
    }
  }
}

TEST_F(CudaKernelsTest, ScalesAndInt8EqualTheirTwins) {
  const device::CudaStream stream;
  const CudaKernelTable& table = cuda_kernels();
  const std::vector<float> host = random_floats(kNumel, 6);
  std::vector<uint8_t> codes(kNumel);
  std::vector<float> nested(kNumel / kAbsmaxBlock + 2, 0.5F);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 97);
  const DeviceArray<uint8_t> codes_there(codes, stream);
  const DeviceArray<float> nested_there(nested, stream);
  std::vector<float> absmax(kNumel);
  const DeviceArray<float> absmax_there(absmax, stream);
  dequantize_absmax(codes.data(), nested.data(), 0.1F, 77, kNumel, absmax.data());
  check_cuda(table.dequantize_absmax(codes_there.data(), nested_there.data(), 0.1F, 77, kNumel,
                                     absmax_there.data(), stream.get()),
             "scales");
  EXPECT_TRUE(same_bits(absmax_there.to_host(), absmax));

  constexpr int64_t kRows = 5000;
  constexpr int64_t kColumns = 211;
  const std::vector<float> matrix(host.begin(), host.begin() + kRows * kColumns);
  const DeviceArray<float> matrix_there(matrix, stream);
  std::vector<int8_t> bytes(matrix.size());
  std::vector<float> scales(kRows);
  const DeviceArray<int8_t> bytes_there(bytes, stream);
  const DeviceArray<float> scales_there(scales, stream);
  quantize_int8(matrix.data(), DType::kF32, kRows, kColumns, bytes.data(), scales.data());
  check_cuda(table.quantize_int8(matrix_there.data(), FoldType::kF32, kRows, kColumns,
                                 bytes_there.data(), scales_there.data(), stream.get()),
             "int8");
  EXPECT_TRUE(same_bits(bytes_there.to_host(), bytes));
  EXPECT_TRUE(same_bits(scales_there.to_host(), scales));
  const int64_t numel = kRows * kColumns - 100;
  std::vector<float> read(static_cast<size_t>(numel));
  const DeviceArray<float> read_there(read, stream);
  dequantize_int8(bytes.data() + 100, scales.data(), kColumns, 100, numel, read.data(),
                  DType::kF32);
  check_cuda(table.dequantize_int8(bytes_there.data() + 100, scales_there.data(), kColumns, 100,
                                   numel, read_there.data(), FoldType::kF32, stream.get()),
             "int8 read");
  EXPECT_TRUE(same_bits(read_there.to_host(), read));
}

}  // namespace
}  // namespace fsdp::kernels
