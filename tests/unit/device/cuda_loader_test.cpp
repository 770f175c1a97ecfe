#include "libfsdp/device/cuda_loader.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "libfsdp/base/error.h"

namespace fsdp::device {
namespace {

// The loader answers once per process; ctest runs each test in a process of its own.
TEST(CudaLoaderTest, AMissingLibraryIsAReasonAndNotACrash) {
  setenv("FSDP_CUDA_LIBRARY", "/nonexistent/libfsdp_cuda.so", 1);
  EXPECT_FALSE(cuda_status().usable);
  EXPECT_NE(cuda_status().reason.find("/nonexistent/libfsdp_cuda.so"), std::string::npos)
      << cuda_status().reason;
  EXPECT_THROW(cuda_runtime(), ConfigError);
  EXPECT_THROW(cuda_symbol("fsdp_cuda_kernel_table"), ConfigError);
}

TEST(CudaLoaderTest, SuccessIsNoError) { EXPECT_NO_THROW(check_cuda(0, "nothing")); }

}  // namespace
}  // namespace fsdp::device
