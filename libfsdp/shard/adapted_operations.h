// LibTorch's own operations on a weight that has an adapter: its layers call them where nobody can
// put anything else.
//
// The weight carries a dispatch key above autograd, one that LibTorch leaves to its tests and to
// whoever runs none. Products with the weight as Linear, Embedding and Conv1d to Conv3d make them
// (linear; addmm and matmul with its t(); embedding; conv1d to conv3d) are the adapter's. Whatever
// else reads the weight reads WeightAdapter::matrix(); what copies it (detach, clone, to, copy_) or
// writes it means the weight itself. Other tensors pay nothing.
//
// What cannot be seen: a copy of the weight that is computed with, and operations inside a
// torch::autograd::Function of the user's, whose graph the adapter's parameters are not in.
#pragma once

#include <ATen/core/Tensor.h>

namespace fsdp {

/// Gives `weight` that key. set_data() takes the key of the new data.
void adapt_operations(const at::Tensor& weight);

}  // namespace fsdp
