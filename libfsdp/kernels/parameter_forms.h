// How a parameter is stored, for the loops that update it. C++17; nvcc reads it.
#pragma once

#include "libfsdp/kernels/rounding.h"

namespace fsdp::kernels {

enum class ParameterForm : int32_t {
  kF32,
  kF32AndBf16,      ///< With a copy, rounded to nearest even.
  kF32AndF16,       ///< With a copy, rounded to nearest even.
  kSplit,           ///< See Note [Split master].
  kBf16,            ///< Rounded to nearest even after each update.
  kBf16Stochastic,  ///< Rounded at random after each update.
};

/// The arrays of a range of a parameter, by form; the others are null.
struct ParameterArrays {
  ParameterForm form = ParameterForm::kF32;
  float* master = nullptr;        ///< kF32...
  uint16_t* copy = nullptr;       ///< kF32AndBf16, kF32AndF16.
  uint16_t* high = nullptr;       ///< kSplit, kBf16...
  uint16_t* remainder = nullptr;  ///< kSplit.
  RoundingKey key = {};           ///< kBf16Stochastic.
  int64_t first = 0;              ///< kBf16Stochastic: the range's place in its parameter.
};

struct F32Parameter {
  float* __restrict__ master;
  explicit FSDP_HD F32Parameter(const ParameterArrays& p) : master(p.master) {}
  FSDP_HD float load(int64_t i) const { return master[i]; }
  FSDP_HD void store(int64_t i, float value) const { master[i] = value; }
};

struct F32AndBf16Parameter {
  float* __restrict__ master;
  uint16_t* __restrict__ copy;
  explicit FSDP_HD F32AndBf16Parameter(const ParameterArrays& p) : master(p.master), copy(p.copy) {}
  FSDP_HD float load(int64_t i) const { return master[i]; }
  FSDP_HD void store(int64_t i, float value) const {
    master[i] = value;
    copy[i] = round_bf16(value);
  }
};

struct F32AndF16Parameter {
  float* __restrict__ master;
  uint16_t* __restrict__ copy;
  explicit FSDP_HD F32AndF16Parameter(const ParameterArrays& p) : master(p.master), copy(p.copy) {}
  FSDP_HD float load(int64_t i) const { return master[i]; }
  FSDP_HD void store(int64_t i, float value) const {
    master[i] = value;
    copy[i] = round_f16(value);
  }
};

struct SplitParameter {
  uint16_t* __restrict__ high;
  uint16_t* __restrict__ remainder;
  explicit FSDP_HD SplitParameter(const ParameterArrays& p)
      : high(p.high), remainder(p.remainder) {}
  FSDP_HD float load(int64_t i) const { return join_master(high[i], remainder[i]); }
  FSDP_HD void store(int64_t i, float value) const {
    const SplitValue split = split_master(value);
    high[i] = split.high;
    remainder[i] = split.remainder;
  }
};

struct Bf16Parameter {
  uint16_t* __restrict__ high;
  explicit FSDP_HD Bf16Parameter(const ParameterArrays& p) : high(p.high) {}
  FSDP_HD float load(int64_t i) const { return Bf16Source::widen(high[i]); }
  FSDP_HD void store(int64_t i, float value) const { high[i] = round_bf16(value); }
};

struct Bf16StochasticParameter {
  uint16_t* __restrict__ high;
  RoundingKey key;
  int64_t first;
  explicit FSDP_HD Bf16StochasticParameter(const ParameterArrays& p)
      : high(p.high), key(p.key), first(p.first) {}
  FSDP_HD float load(int64_t i) const { return Bf16Source::widen(high[i]); }
  FSDP_HD void store(int64_t i, float value) const {
    high[i] = round_bf16_stochastic(value, random_word(key, first + i));
  }
};

/// Returns body(parameter) for the struct above that fits the form. Host only; inlined, so that the
/// caller's instruction set is that of the body's loops.
template <class Body>
inline __attribute__((always_inline)) auto with_parameter(const ParameterArrays& arrays,
                                                          const Body& body) {
  switch (arrays.form) {
    case ParameterForm::kF32AndBf16:
      return body(F32AndBf16Parameter(arrays));
    case ParameterForm::kF32AndF16:
      return body(F32AndF16Parameter(arrays));
    case ParameterForm::kSplit:
      return body(SplitParameter(arrays));
    case ParameterForm::kBf16:
      return body(Bf16Parameter(arrays));
    case ParameterForm::kBf16Stochastic:
      return body(Bf16StochasticParameter(arrays));
    case ParameterForm::kF32:
      break;
  }
  return body(F32Parameter(arrays));
}

}  // namespace fsdp::kernels
