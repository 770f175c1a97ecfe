// Packed weights on a real GPU: unpacked to the CPU's bits, and what frozen layers compute with
// them.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "libfsdp/base/error.h"
#include "libfsdp/device/cuda_loader.h"
#include "libfsdp/kernels/compute.h"
#include "libfsdp/lora/functions.h"
#include "libfsdp/lora/packed_weight.h"
#include "libfsdp/shard/shell.h"

namespace fsdp::lora {
namespace {

constexpr int64_t kRows = 517;
constexpr int64_t kColumns = 203;  // Rows begin within blocks, and the last block is short.

const std::vector<PackedWeight> kWeights = {
    {PackedFormat::kNf4, kRows, kColumns, 64, false},
    {PackedFormat::kNf4, kRows, kColumns, 64, true},
    {PackedFormat::kFp4, kRows, kColumns, 128, true},
    {PackedFormat::kInt8, kRows, kColumns, kColumns, false}};

// Any codes, scales about 0.02.
at::Tensor random_bytes(const PackedWeight& weight) {
  at::manual_seed(weight.bytes());
  const at::Tensor packed = at::randint(0, 256, {weight.bytes()}, at::kByte);
  const auto floats = [&](int64_t at, int64_t n) {
    packed.narrow(0, at, n * 4).view(at::kFloat).copy_(at::rand({n}) * 0.02 + 0.01);
  };
  if (!weight.double_quant) {
    floats(weight.scales_at(), weight.scales());
  } else {
    floats(weight.nested_at(), (weight.scales() + 255) / 256);
    floats(weight.offset_at(), 1);
  }
  return packed;
}

class PackedWeightOnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!device::cuda_status().usable) GTEST_SKIP() << device::cuda_status().reason;
    compute_ = kernels::make_cuda_compute(0);
    gpu_ = device_of(*compute_);
  }
  std::shared_ptr<kernels::Compute> compute_;
  at::Device gpu_ = at::kCPU;
};

TEST_F(PackedWeightOnGpu, IsUnpackedToTheBitsOfTheCpu) {
  for (const PackedWeight& weight : kWeights) {
    const at::Tensor packed = random_bytes(weight);
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
      SCOPED_TRACE(cat(static_cast<int>(weight.format), weight.double_quant, c10::toString(type)));
      const at::Tensor here = unpack(weight, packed, type);
      ASSERT_TRUE(at::isfinite(here).all().item<bool>());
      EXPECT_TRUE(at::equal(unpack(weight, packed.to(gpu_), type).cpu(), here));
    }
  }
}

TEST_F(PackedWeightOnGpu, FrozenLayersComputeWithIt) {
  for (const PackedWeight& weight : kWeights) {
    const auto shared = std::make_shared<const PackedWeight>(weight);
    const at::Tensor packed = random_bytes(weight);
    const at::Tensor x = at::randn({5, kColumns});
    const LowRank low{at::randn({4, kColumns}), at::randn({kRows, 4}), 0.5};
    const auto run = [&](at::Device device) {
      at::Tensor input = x.to(device).requires_grad_();
      const LowRank moved{low.a.to(device), low.b.to(device), low.scaling};
      const at::Tensor y = lora_linear(input, {}, {packed.to(device), shared}, {}, moved);
      y.square().sum().backward();
      return std::pair(y.detach().cpu(), input.grad().cpu());
    };
    const auto [y, dx] = run(at::kCPU);
    const auto [y_there, dx_there] = run(gpu_);
    EXPECT_TRUE(at::allclose(y_there, y, 1e-4, 1e-4 * y.abs().max().item<double>()));
    EXPECT_TRUE(at::allclose(dx_there, dx, 1e-4, 1e-4 * dx.abs().max().item<double>()));
  }
}

}  // namespace
}  // namespace fsdp::lora
