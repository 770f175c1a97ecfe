#include <cstring>

#include "libfsdp/base/error.h"
#include "tests/gpu/device_data.h"

namespace fsdp::device {
namespace {

class CudaObjectsTest : public GpuTest {};

TEST_F(CudaObjectsTest, EventsOrderWorkOfTwoStreams) {
  const StreamSet streams;
  const CudaEvent gathered(CudaEvent::Timing::kOn);
  const CudaEvent computed(CudaEvent::Timing::kOn);
  constexpr size_t kBytes = 64 << 20;
  const PinnedBuffer host(kBytes);
  const CudaBuffer slot(kBytes);
  std::memset(host.data(), 7, kBytes);
  copy_async(slot.data(), host.data(), kBytes, streams.gather);
  gathered.record(streams.gather);
  streams.compute.wait(gathered);
  fill_async(slot.data(), 9, kBytes / 2, streams.compute);
  copy_async(host.data(), slot.data(), kBytes, streams.compute);
  computed.record(streams.compute);
  computed.synchronize();
  EXPECT_TRUE(gathered.done());
  EXPECT_GE(computed.elapsed_ms(gathered), 0.0F);
  EXPECT_EQ(host.data()[0], std::byte{9});
  EXPECT_EQ(host.data()[kBytes / 2], std::byte{7});
}

TEST_F(CudaObjectsTest, TooLargeABufferIsADeviceMemoryError) {
  EXPECT_THROW(CudaBuffer(cuda_memory_info().total_bytes * 2), DeviceMemoryError);
}

TEST_F(CudaObjectsTest, AnInvalidDeviceIsNamed) {
  try {
    set_cuda_device(1000);
    FAIL() << "no error";
  } catch (const InternalError& error) {
    EXPECT_NE(std::string(error.what()).find("cudaErrorInvalidDevice"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace fsdp::device
