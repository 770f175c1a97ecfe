// The Compute of a device for those who have only its memory.
#pragma once

#include "libfsdp/kernels/compute.h"

namespace fsdp::kernels {

/// One for the process and CUDA device `device`, made when it is first asked for; else as
/// make_cuda_compute(). Any thread may ask, and enqueue with the functions that read packed
/// weights.
Compute& device_compute(int device);

}  // namespace fsdp::kernels
