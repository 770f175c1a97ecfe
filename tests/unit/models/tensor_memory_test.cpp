#include "libfsdp/models/tensor_memory.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <vector>

namespace fsdp::models {
namespace {

TEST(TensorMemoryTest, LargeTensorsOfEqualStepsLieAtEqualAddresses) {
  const at::Tensor before = at::ones({1 << 20});  // Of the allocator so far: freed by it, too.
  ASSERT_TRUE(use_tensor_heap());
  ASSERT_TRUE(use_tensor_heap());
  std::vector<at::Tensor> small;  // In a general heap these would come to lie between the others.
  std::vector<std::vector<const void*>> steps;
  for (int step = 0; step < 3; ++step) {
    std::vector<at::Tensor> tensors;
    steps.emplace_back();
    for (int64_t i = 0; i < 20; ++i) {
      tensors.push_back(at::ones({(i % 3 + 1) << 15}));
      small.push_back(at::ones({5000}));
      steps.back().push_back(tensors.back().const_data_ptr());
    }
    for (const at::Tensor& t : tensors) EXPECT_EQ(t.sum().item<float>(), t.numel());
  }
  EXPECT_EQ(steps[1], steps[0]);
  EXPECT_EQ(steps[2], steps[0]);
}

TEST(TensorMemoryTest, EmptyAndResizedTensorsWork) {
  ASSERT_TRUE(use_tensor_heap());
  EXPECT_EQ(at::empty({0}).numel(), 0);
  at::Tensor t = at::ones({100});
  t.resize_({1 << 20});
  EXPECT_EQ(t.narrow(0, 0, 100).sum().item<float>(), 100);
}

}  // namespace
}  // namespace fsdp::models
