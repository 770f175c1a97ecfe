#include "libfsdp/kernels/split_master.h"

#include "libfsdp/kernels/cpu_clones.h"
#include "libfsdp/kernels/element_math.h"

namespace fsdp::kernels {

FSDP_CPU_CLONES
void split_master_cpu(const float* __restrict master, uint16_t* __restrict high,
                      uint16_t* __restrict remainder, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const SplitValue split = split_master(master[i]);
    high[i] = split.high;
    remainder[i] = split.remainder;
  }
}

FSDP_CPU_CLONES
void join_master_cpu(const uint16_t* __restrict high, const uint16_t* __restrict remainder,
                     float* __restrict master, int64_t n) {
  for (int64_t i = 0; i < n; ++i) master[i] = join_master(high[i], remainder[i]);
}

}  // namespace fsdp::kernels
