// Data that a GPU test keeps on the device and compares on the host.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "libfsdp/device/cuda_loader.h"
#include "libfsdp/device/cuda_objects.h"

namespace fsdp::device {

/// Skips its tests, with the reason, where CUDA cannot be used.
class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cuda_status().usable) GTEST_SKIP() << cuda_status().reason;
    set_cuda_device(0);
  }
};

/// An array on the device, made from one on the host.
template <class T>
class DeviceArray {
 public:
  DeviceArray(const std::vector<T>& values, const CudaStream& stream)
      : buffer_(values.size() * sizeof(T)), numel_(values.size()), stream_(stream) {
    copy_async(buffer_.data(), values.data(), buffer_.bytes(), stream);
    stream.synchronize();
  }
  T* data() const { return reinterpret_cast<T*>(buffer_.data()); }
  /// Waits for the stream and copies back.
  std::vector<T> to_host() const {
    std::vector<T> values(numel_);
    copy_async(values.data(), buffer_.data(), buffer_.bytes(), stream_);
    stream_.synchronize();
    return values;
  }

 private:
  CudaBuffer buffer_;
  size_t numel_;
  const CudaStream& stream_;
};

/// Whether two arrays have the same bits.
template <class T>
::testing::AssertionResult same_bits(const std::vector<T>& got, const std::vector<T>& expected) {
  if (got.size() != expected.size()) return ::testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::memcmp(&got[i], &expected[i], sizeof(T)) == 0) continue;
    return ::testing::AssertionFailure()
           << "element " << i << " is " << got[i] << ", expected " << expected[i];
  }
  return ::testing::AssertionSuccess();
}

}  // namespace fsdp::device
