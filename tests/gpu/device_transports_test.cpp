// The transports of devices on a real one: NCCL with one rank, CUDA IPC with two processes on one
// GPU. This program is also those processes.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/device/device_transport.h"
#include "libfsdp/comm/host/thread_world.h"
#include "libfsdp/comm/join.h"
#include "libfsdp/kernels/compute.h"
#include "tests/gpu/device_data.h"
#include "tests/support/device_cases.h"
#include "tests/support/rank_processes.h"

namespace fsdp::comm {
namespace {

class DeviceTransportsTest : public device::GpuTest {};

TEST_F(DeviceTransportsTest, NcclWithOneRankGathersAndFolds) {
  const auto c = on_device(make_single(), {}, "nccl");
  testing::gather_and_fold(*c);
  c->allow_any_order(true);
  testing::gather_and_fold(*c);
}

TEST_F(DeviceTransportsTest, TwoProcessesOnOneGpuGatherAndFoldOverCudaIpc) {
  auto ranks = testing::start_ranks(2, {testing::this_program()},
                                    {"FSDP_TEST_CASE=gather_and_fold", "FSDP_COMM=cuda_ipc"});
  for (auto& rank : ranks) {
    const std::string status = testing::describe_status(rank.wait(120));
    EXPECT_EQ(status, "exit 0") << rank.output();
  }
}

TEST_F(DeviceTransportsTest, ComputeEqualsTheHosts) {
  const auto cuda = kernels::make_cuda_compute(0);
  constexpr int64_t kNumel = 1'300'000 / 128 * 128;
  std::vector<float> values = testing::values_of(3, kNumel, 0);
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    SCOPED_TRACE(dtype_name(dtype));
    const kernels::ComputeMemory master = cuda->allocate(kNumel * 4, "master");
    const kernels::ComputeMemory copy = cuda->allocate(kNumel * 4, "copy");
    cuda->write_floats(values, master.get(), DType::kF32);
    cuda->convert(reinterpret_cast<float*>(master.get()), copy.get(), dtype, kNumel);
    std::vector<std::byte> got(static_cast<size_t>(kNumel) * dtype_bytes(dtype));
    std::vector<std::byte> expected(got.size());
    cuda->read(copy.get(), got.data(), got.size());
    convert_floats(values.data(), DType::kF32, expected.data(), dtype, values.size());
    EXPECT_TRUE(got == expected);
  }
  const kernels::ComputeMemory array = cuda->allocate(kNumel * 4, "gradient");
  auto* const gradient = reinterpret_cast<float*>(array.get());
  cuda->write_floats(values, gradient, DType::kF32);
  cuda->scale(gradient, kNumel, 0.37F, 1.5F);
  kernels::host_compute().scale(values.data(), kNumel, 0.37F, 1.5F);
  std::vector<float> scaled(values.size());
  cuda->read_floats(gradient, DType::kF32, scaled);
  EXPECT_TRUE(device::same_bits(scaled, values));
  const std::span<const float> on_device{gradient, static_cast<size_t>(kNumel)};
  const std::span<const float> on_host = values;
  const auto sums = cuda->sum_gradients({&on_device, 1}, kernels::NormType::kTwo);
  EXPECT_EQ(sums.sum,
            kernels::host_compute().sum_gradients({&on_host, 1}, kernels::NormType::kTwo).sum);
}

int run_as_rank() {
  try {
    const auto communicator = join();
    try {
      testing::gather_and_fold(*communicator);
    } catch (const std::exception& e) {
      communicator->abort(e.what());
      throw;
    }
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}

}  // namespace
}  // namespace fsdp::comm

int main(int argc, char** argv) {
  if (std::getenv("FSDP_TEST_CASE") != nullptr) return fsdp::comm::run_as_rank();
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
