// The arithmetic of every kernel, one element at a time. The CPU loops and the CUDA kernels both
// call these bodies, so a formula is written, and tested, once.
//
// Note [Bits do not depend on where an element lies] Each body uses only IEEE operations that round
// the same on every device (add, multiply, divide, square root, conversions, integers); no compiler
// may contract a multiply and an add into one operation (-ffp-contract=off, --fmad=false). So an
// element's result is the same in a vector, in the tail of a loop, on any instruction set, on the
// GPU, and at any place of a shard.
//
// C++17 and free of other headers of ours: nvcc reads it too.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FSDP_HD __host__ __device__ __forceinline__
#else
#define FSDP_HD inline __attribute__((always_inline))
#endif

namespace fsdp::kernels {

/// Elements of one quantum: shards are cut at multiples of it, sums are taken over it.
constexpr int64_t kQuantum = 128;

FSDP_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FSDP_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FSDP_HD bool is_finite_bits(uint32_t bits) { return (bits & 0x7f800000U) != 0x7f800000U; }

/// Square root, correctly rounded.
FSDP_HD float square_root(float value) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(value);
#else
  return __builtin_sqrtf(value);
#endif
}

/// What a pointer to elements of a storage type reads as: float, bfloat16 bits or half bits,
/// widened exactly.
struct F32Source {
  using Storage = float;
  static FSDP_HD float widen(float value) { return value; }
};
struct Bf16Source {
  using Storage = uint16_t;
  static FSDP_HD float widen(uint16_t bits) { return bits_float(uint32_t{bits} << 16); }
};
struct F16Source {
  using Storage = uint16_t;
  /// Without branches and without float subnormals, so that it vectorises and no flush-to-zero mode
  /// can touch it.
  static FSDP_HD float widen(uint16_t bits) {
    const uint32_t sign = (uint32_t{bits} & 0x8000U) << 16;
    const uint32_t magnitude = uint32_t{bits} & 0x7fffU;
    const uint32_t normal = (magnitude << 13) + (112U << 23);
    const uint32_t special = (magnitude << 13) + (224U << 23);  // infinity and NaN
    // A subnormal half m * 2^-24: the float 2^-14 + m * 2^-24 exists exactly, and so does the
    // difference.
    const float subnormal = bits_float((magnitude << 13) + (113U << 23)) - bits_float(113U << 23);
    uint32_t result = normal;
    result = magnitude >= 0x7c00U ? special : result;
    result = magnitude < 0x0400U ? float_bits(subnormal) : result;
    return bits_float(result | sign);
  }
};

// Note [Split master] An fp32 value is kept as a bfloat16, which is the parameter that the model
// computes with, and 16 bits more. The bfloat16 is rounded half up in magnitude: then each has
// exactly 65,536 preimages, which the low 16 bits of the value tell apart (to nearest even it would
// have up to 65,537). joined = bits minus the carry that the rounding made, which is visible as the
// top bit of the remainder. Finite values and infinities come back exactly; a NaN comes back as a
// quiet NaN with the low payload bits cleared. Above the largest bfloat16 (|x| >= 3.3961775e38) the
// bfloat16 is infinite, as with any rounding to nearest, while the master stays exact.

struct SplitValue {
  uint16_t high;       ///< bfloat16 bits.
  uint16_t remainder;  ///< Low 16 bits of the fp32 value.
};

FSDP_HD SplitValue split_master(float value) {
  const uint32_t bits = float_bits(value);
  const bool is_nan = (bits & 0x7fffffffU) > 0x7f800000U;
  const uint32_t rounded = (bits + 0x8000U) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x0040U;
  return {static_cast<uint16_t>(is_nan ? quiet : rounded),
          static_cast<uint16_t>(is_nan ? 0U : bits & 0xffffU)};
}

FSDP_HD float join_master(uint16_t high, uint16_t remainder) {
  const uint32_t carry = uint32_t{remainder} >> 15;
  return bits_float(((uint32_t{high} - carry) << 16) | remainder);
}

/// The gradient that an update descends along: scaled, then clamped to [-clip_value, clip_value].
FSDP_HD float prepared_gradient(float gradient, float grad_scale, float clip_value) {
  const float scaled = gradient * grad_scale;
  const float from_below = scaled < -clip_value ? -clip_value : scaled;
  return from_below > clip_value ? clip_value : from_below;
}

/// Everything an AdamW step needs besides the arrays, computed once on the host (see
/// optim/optimizer.cpp).
struct AdamWScalars {
  float grad_scale;  ///< Multiplied into the gradient first: clip coefficient / tokens.
  float clip_value;  ///< Then it is clamped to [-clip_value, clip_value]; infinite = not.
  float decay;       ///< 1 - lr * weight_decay.
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;              ///< lr / (1 - beta1^step).
  float bias_correction2_sqrt;  ///< sqrt(1 - beta2^step).
  float epsilon;
};

/// One element of torch.optim.AdamW, its operations in its order; returns the new parameter.
FSDP_HD float adamw_element(float parameter, float gradient, float& exp_avg, float& exp_avg_sq,
                            const AdamWScalars& s) {
  const float g = prepared_gradient(gradient, s.grad_scale, s.clip_value);
  const float decayed = parameter * s.decay;
  const float m = exp_avg + s.one_minus_beta1 * (g - exp_avg);
  const float v = exp_avg_sq * s.beta2 + s.one_minus_beta2 * g * g;
  const float denominator = square_root(v) / s.bias_correction2_sqrt + s.epsilon;
  exp_avg = m;
  exp_avg_sq = v;
  return decayed - s.step_size * m / denominator;
}

struct SgdScalars {
  float grad_scale;    ///< Multiplied into the gradient first.
  float clip_value;    ///< Then it is clamped to [-clip_value, clip_value]; infinite = not.
  float weight_decay;  ///< Added to the gradient as weight_decay * parameter, as torch.optim.SGD
                       ///< does.
  float learning_rate;
  float momentum;
};

/// Gradient that SGD descends along, before momentum.
FSDP_HD float sgd_gradient(float parameter, float gradient, const SgdScalars& s) {
  return prepared_gradient(gradient, s.grad_scale, s.clip_value) + s.weight_decay * parameter;
}

/// Without momentum; returns the new parameter.
FSDP_HD float sgd_element(float parameter, float gradient, const SgdScalars& s) {
  return parameter - s.learning_rate * sgd_gradient(parameter, gradient, s);
}

/// With momentum (buffer zero before the first step); returns the new parameter.
template <bool kNesterov>
FSDP_HD float sgd_momentum_element(float parameter, float gradient, float& buffer,
                                   const SgdScalars& s) {
  const float g = sgd_gradient(parameter, gradient, s);
  buffer = buffer * s.momentum + g;
  return parameter - s.learning_rate * (kNesterov ? g + s.momentum * buffer : buffer);
}

/// Norms of a gradient.
enum class NormType : int32_t { kTwo, kOne, kInf };

/// What an element adds to the sum behind a norm: its square, or its magnitude. Exact.
template <NormType kType>
FSDP_HD double norm_term(float value) {
  const auto wide = static_cast<double>(value);
  return kType == NormType::kTwo ? wide * wide : (wide < 0 ? -wide : wide);
}

// Note [Order of a quantum's sum] The terms of a quantum are summed in double by 8 lanes, lane j
// taking elements j, j+8, j+16, ..., then ((0+4)+(2+6)) + ((1+5)+(3+7)). A term is exact in double;
// the order is the same everywhere.
constexpr int kQuantumLanes = 8;

/// Sum of 8 lanes in that order. `lane(j)` returns lane j's sum.
template <class Lane>
FSDP_HD double combine_quantum_lanes(const Lane& lane) {
  return ((lane(0) + lane(4)) + (lane(2) + lane(6))) + ((lane(1) + lane(5)) + (lane(3) + lane(7)));
}

// Note [Exact sum] The limbs of ExactSum (exact_sum.h): digit d counts units of 2^(32 d - 1074), so
// that a double, whose mantissa is 53 bits at some place, is an integer added to three neighbouring
// digits. Integers add in any order.
constexpr int kExactSumDigits = 68;
constexpr int kExactSumLimbs =
    kExactSumDigits + 1;  ///< The last one counts terms that are infinite or NaN.

/// Calls add_limb(index, amount) for the limbs that a term changes; each |amount| < 2^34.
template <class AddLimb>
FSDP_HD void spread_exact_term(double term, const AddLimb& add_limb) {
  uint64_t bits;
  memcpy(&bits, &term, sizeof bits);
  const int exponent = static_cast<int>((bits >> 52) & 0x7ff);
  if (exponent == 0x7ff) {
    add_limb(kExactSumDigits, int64_t{1});
    return;
  }
  const uint64_t mantissa = (bits & 0xfffffffffffffULL) | (exponent ? uint64_t{1} << 52 : 0);
  const int position = exponent ? exponent - 1 : 0;
  const uint64_t low = (mantissa & 0xffffffffULL) << (position % 32);
  const uint64_t high = (mantissa >> 32) << (position % 32);
  const int64_t sign = (bits >> 63) ? -1 : 1;
  add_limb(position / 32, sign * static_cast<int64_t>(low & 0xffffffffULL));
  add_limb(position / 32 + 1, sign * static_cast<int64_t>((low >> 32) + (high & 0xffffffffULL)));
  add_limb(position / 32 + 2, sign * static_cast<int64_t>(high >> 32));
}

}  // namespace fsdp::kernels
