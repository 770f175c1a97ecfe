#include "libfsdp/kernels/update.h"

#include "libfsdp/kernels/cpu_clones.h"

namespace fsdp::kernels {
namespace {

// Where a master lives. Loops are written once over either; the compiler sees plain restricted
// pointers.
struct F32Master {
  float* __restrict values;
  FSDP_HD float load(int64_t i) const { return values[i]; }
  FSDP_HD void store(int64_t i, float value) const { values[i] = value; }
};
struct SplitMaster {
  uint16_t* __restrict high;
  uint16_t* __restrict remainder;
  FSDP_HD float load(int64_t i) const { return join_master(high[i], remainder[i]); }
  FSDP_HD void store(int64_t i, float value) const {
    const SplitValue split = split_master(value);
    high[i] = split.high;
    remainder[i] = split.remainder;
  }
};

template <class Master>
FSDP_HD void adamw_loop(Master master, const float* __restrict gradient, float* __restrict exp_avg,
                        float* __restrict exp_avg_sq, int64_t n, AdamWScalars s) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    float m = exp_avg[i];
    float v = exp_avg_sq[i];
    master.store(i, adamw_element(master.load(i), gradient[i], m, v, s));
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
  }
}

template <class Master>
FSDP_HD void sgd_loop(Master master, const float* __restrict gradient, int64_t n, SgdScalars s) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) master.store(i, sgd_element(master.load(i), gradient[i], s));
}

template <bool kNesterov, class Master>
FSDP_HD void momentum_loop(Master master, const float* __restrict gradient,
                           float* __restrict buffer, int64_t n, SgdScalars s) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    float b = buffer[i];
    master.store(i, sgd_momentum_element<kNesterov>(master.load(i), gradient[i], b, s));
    buffer[i] = b;
  }
}

template <class Master>
FSDP_HD void sgd_any(Master master, const float* gradient, float* buffer, int64_t n, bool nesterov,
                     const SgdScalars& scalars) {
  if (buffer == nullptr) {
    sgd_loop(master, gradient, n, scalars);
  } else if (nesterov) {
    momentum_loop<true>(master, gradient, buffer, n, scalars);
  } else {
    momentum_loop<false>(master, gradient, buffer, n, scalars);
  }
}

}  // namespace

FSDP_CPU_CLONES
void adamw_f32(float* master, const float* gradient, float* exp_avg, float* exp_avg_sq, int64_t n,
               const AdamWScalars& scalars) {
  adamw_loop(F32Master{master}, gradient, exp_avg, exp_avg_sq, n, scalars);
}

FSDP_CPU_CLONES
void adamw_split(uint16_t* high, uint16_t* remainder, const float* gradient, float* exp_avg,
                 float* exp_avg_sq, int64_t n, const AdamWScalars& scalars) {
  adamw_loop(SplitMaster{high, remainder}, gradient, exp_avg, exp_avg_sq, n, scalars);
}

FSDP_CPU_CLONES
void sgd_f32(float* master, const float* gradient, float* buffer, int64_t n, bool nesterov,
             const SgdScalars& scalars) {
  sgd_any(F32Master{master}, gradient, buffer, n, nesterov, scalars);
}

FSDP_CPU_CLONES
void sgd_split(uint16_t* high, uint16_t* remainder, const float* gradient, float* buffer, int64_t n,
               bool nesterov, const SgdScalars& scalars) {
  sgd_any(SplitMaster{high, remainder}, gradient, buffer, n, nesterov, scalars);
}

}  // namespace fsdp::kernels
