#include "libfsdp/kernels/update.h"

#include "libfsdp/kernels/cpu_clones.h"

namespace fsdp::kernels {
namespace {

// Loops are written once over any form of a parameter; the compiler sees plain restricted pointers.
struct AdamWLoop {
  const float* __restrict gradient;
  float* __restrict exp_avg;
  float* __restrict exp_avg_sq;
  int64_t n;
  AdamWScalars scalars;

  template <class Parameter>
  FSDP_HD void operator()(Parameter parameter) const {
    const AdamWScalars s = scalars;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      float m = exp_avg[i];
      float v = exp_avg_sq[i];
      parameter.store(i, adamw_element(parameter.load(i), gradient[i], m, v, s));
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
    }
  }
};

struct SgdLoop {
  const float* __restrict gradient;
  float* __restrict buffer;
  int64_t n;
  bool nesterov;
  SgdScalars scalars;

  template <class Parameter>
  FSDP_HD void operator()(Parameter parameter) const {
    if (buffer == nullptr) {
      plain(parameter);
    } else if (nesterov) {
      with_momentum<true>(parameter);
    } else {
      with_momentum<false>(parameter);
    }
  }

  template <class Parameter>
  FSDP_HD void plain(Parameter parameter) const {
    const SgdScalars s = scalars;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      parameter.store(i, sgd_element(parameter.load(i), gradient[i], s));
    }
  }

  template <bool kNesterov, class Parameter>
  FSDP_HD void with_momentum(Parameter parameter) const {
    const SgdScalars s = scalars;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      float b = buffer[i];
      parameter.store(i, sgd_momentum_element<kNesterov>(parameter.load(i), gradient[i], b, s));
      buffer[i] = b;
    }
  }
};

struct RunLoop {
  int64_t n;
  template <class Body>
  FSDP_HD void operator()(const Body& each) const {
    const Body body = each;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) body(i);
  }
};

}  // namespace

FSDP_CPU_CLONES
void adamw(const ParameterArrays& parameter, const float* gradient, float* exp_avg,
           float* exp_avg_sq, int64_t n, const AdamWScalars& scalars) {
  with_parameter(parameter, AdamWLoop{gradient, exp_avg, exp_avg_sq, n, scalars});
}

FSDP_CPU_CLONES
void sgd(const ParameterArrays& parameter, const float* gradient, float* buffer, int64_t n,
         bool nesterov, const SgdScalars& scalars) {
  with_parameter(parameter, SgdLoop{gradient, buffer, n, nesterov, scalars});
}

FSDP_CPU_CLONES
void any_precision_adamw(const AnyPrecisionArrays& arrays, int64_t n,
                         const AnyPrecisionScalars& scalars) {
  with_any_precision(arrays, scalars, RunLoop{n});
}

}  // namespace fsdp::kernels
