// AdamW with state, and a parameter, of less than fp32: the arithmetic. C++17; nvcc reads it.
//
// Note [AnyPrecision] The formula is AnyPrecisionAdamW's (torchdistx): each of its tensor
// operations computes in fp32 and rounds to the type of the tensor that it writes. Rounding at
// random is ours: there the parameter is computed in fp32, decay included, and rounded once.
#pragma once

#include "libfsdp/kernels/rounding.h"

namespace fsdp::kernels {

enum class AnyType : int32_t { kF32, kBf16 };

/// Reads and writes elements of a type.
struct AnyF32 {
  using Storage = float;
  static FSDP_HD float widen(float value) { return value; }
  static FSDP_HD float narrow(float value) { return value; }
};
struct AnyBf16 {
  using Storage = uint16_t;
  static FSDP_HD float widen(uint16_t bits) { return Bf16Source::widen(bits); }
  static FSDP_HD uint16_t narrow(float value) { return round_bf16(value); }
};

/// `value` as an element of T.
template <class T>
FSDP_HD float rounded(float value) {
  return T::widen(T::narrow(value));
}

struct AnyPrecisionScalars {
  float grad_scale;
  float clip_value;  ///< Infinite = none.
  float decay;       ///< 1 - lr * weight_decay.
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;              ///< lr / (1 - beta1^step).
  float bias_correction2_sqrt;  ///< sqrt(1 - beta2^step).
  float epsilon;
};

/// New moments of type M and V, and returns what is added to the parameter.
template <class M, class V>
FSDP_HD float any_precision_change(float gradient, float& exp_avg, float& exp_avg_sq,
                                   const AnyPrecisionScalars& s) {
  const float g = prepared_gradient(gradient, s.grad_scale, s.clip_value);
  const float kept_m = rounded<M>(exp_avg * s.beta1);
  const float kept_v = rounded<V>(exp_avg_sq * s.beta2);
  exp_avg = rounded<M>(kept_m + s.one_minus_beta1 * g);
  exp_avg_sq = rounded<V>(kept_v + s.one_minus_beta2 * g * g);
  const float root = rounded<V>(square_root(exp_avg_sq));
  const float corrected = rounded<V>(root / s.bias_correction2_sqrt);
  const float denominator = rounded<V>(corrected + s.epsilon);
  return -s.step_size * exp_avg / denominator;
}

/// Adds `change` to a decayed parameter of type P through a compensation of type C (Kahan), which
/// keeps what the parameter could not take.
template <class P, class C>
FSDP_HD float add_compensated(float parameter, float change, float& compensation) {
  const float wanted = rounded<C>(compensation + change);
  const float result = rounded<P>(parameter + wanted);
  compensation = rounded<C>(wanted + rounded<P>(parameter - result));
  return result;
}

/// Arrays of a range; null where the optimizer has none.
struct AnyPrecisionArrays {
  AnyType parameter_type = AnyType::kBf16;
  void* parameter = nullptr;
  const float* gradient = nullptr;
  AnyType exp_avg_type = AnyType::kF32;
  void* exp_avg = nullptr;
  AnyType exp_avg_sq_type = AnyType::kF32;
  void* exp_avg_sq = nullptr;
  AnyType compensation_type = AnyType::kBf16;
  void* compensation = nullptr;  ///< Null = no Kahan summation.
  bool stochastic = false;       ///< The parameter is bf16 and rounded at random; no compensation.
  RoundingKey key = {};
  int64_t first = 0;  ///< The range's place in its parameter, for `key`.
};

/// The update of element i of arrays of these types.
template <class P, class M, class V>
struct AnyPrecisionBody {
  typename P::Storage* __restrict__ parameter;
  const float* __restrict__ gradient;
  typename M::Storage* __restrict__ exp_avg;
  typename V::Storage* __restrict__ exp_avg_sq;
  AnyPrecisionScalars scalars;

  AnyPrecisionBody(const AnyPrecisionArrays& a, const AnyPrecisionScalars& s)
      : parameter(static_cast<typename P::Storage*>(a.parameter)),
        gradient(a.gradient),
        exp_avg(static_cast<typename M::Storage*>(a.exp_avg)),
        exp_avg_sq(static_cast<typename V::Storage*>(a.exp_avg_sq)),
        scalars(s) {}

  /// Updates the moments; returns the change of the parameter.
  FSDP_HD float change(int64_t i) const {
    float m = M::widen(exp_avg[i]);
    float v = V::widen(exp_avg_sq[i]);
    const float result = any_precision_change<M, V>(gradient[i], m, v, scalars);
    exp_avg[i] = M::narrow(m);
    exp_avg_sq[i] = V::narrow(v);
    return result;
  }
  FSDP_HD float decayed(int64_t i) const { return P::widen(parameter[i]) * scalars.decay; }
};

template <class P, class M, class V>
struct AnyPrecisionPlain : AnyPrecisionBody<P, M, V> {
  using AnyPrecisionBody<P, M, V>::AnyPrecisionBody;
  FSDP_HD void operator()(int64_t i) const {
    this->parameter[i] = P::narrow(rounded<P>(this->decayed(i)) + this->change(i));
  }
};

template <class P, class M, class V, class C>
struct AnyPrecisionKahan : AnyPrecisionBody<P, M, V> {
  typename C::Storage* __restrict__ compensation;
  AnyPrecisionKahan(const AnyPrecisionArrays& a, const AnyPrecisionScalars& s)
      : AnyPrecisionBody<P, M, V>(a, s),
        compensation(static_cast<typename C::Storage*>(a.compensation)) {}
  FSDP_HD void operator()(int64_t i) const {
    float c = C::widen(compensation[i]);
    const float p = rounded<P>(this->decayed(i));
    this->parameter[i] = P::narrow(add_compensated<P, C>(p, this->change(i), c));
    compensation[i] = C::narrow(c);
  }
};

template <class M, class V>
struct AnyPrecisionStochastic : AnyPrecisionBody<AnyBf16, M, V> {
  RoundingKey key;
  int64_t first;
  AnyPrecisionStochastic(const AnyPrecisionArrays& a, const AnyPrecisionScalars& s)
      : AnyPrecisionBody<AnyBf16, M, V>(a, s), key(a.key), first(a.first) {}
  FSDP_HD void operator()(int64_t i) const {
    this->parameter[i] =
        round_bf16_stochastic(this->decayed(i) + this->change(i), random_word(key, first + i));
  }
};

/// Calls run(body) with the body that fits the arrays' types. Host only, inlined as
/// with_parameter().
template <class P, class M, class V, class Run>
inline __attribute__((always_inline)) auto with_any_compensation(const AnyPrecisionArrays& a,
                                                                 const AnyPrecisionScalars& s,
                                                                 const Run& run) {
  if (a.compensation == nullptr) return run(AnyPrecisionPlain<P, M, V>(a, s));
  if (a.compensation_type == AnyType::kF32) return run(AnyPrecisionKahan<P, M, V, AnyF32>(a, s));
  return run(AnyPrecisionKahan<P, M, V, AnyBf16>(a, s));
}

template <class M, class V, class Run>
inline __attribute__((always_inline)) auto with_any_parameter(const AnyPrecisionArrays& a,
                                                              const AnyPrecisionScalars& s,
                                                              const Run& run) {
  if (a.stochastic) return run(AnyPrecisionStochastic<M, V>(a, s));
  if (a.parameter_type == AnyType::kF32) return with_any_compensation<AnyF32, M, V>(a, s, run);
  return with_any_compensation<AnyBf16, M, V>(a, s, run);
}

template <class Run>
inline __attribute__((always_inline)) auto with_any_precision(const AnyPrecisionArrays& a,
                                                              const AnyPrecisionScalars& s,
                                                              const Run& run) {
  const bool wide_m = a.exp_avg_type == AnyType::kF32;
  const bool wide_v = a.exp_avg_sq_type == AnyType::kF32;
  if (wide_m && wide_v) return with_any_parameter<AnyF32, AnyF32>(a, s, run);
  if (wide_m) return with_any_parameter<AnyF32, AnyBf16>(a, s, run);
  if (wide_v) return with_any_parameter<AnyBf16, AnyF32>(a, s, run);
  return with_any_parameter<AnyBf16, AnyBf16>(a, s, run);
}

}  // namespace fsdp::kernels
