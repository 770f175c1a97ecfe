// A sum of doubles that does not depend on the order of its terms.
#pragma once

#include <array>
#include <cstdint>

namespace fsdp::kernels {

/// Exact fixed-point sum over the whole range of double: any number of terms, in any order and
/// grouping, gives the same bits. A term that is not finite is counted, and makes the result NaN.
///
/// 32-bit digits in 64-bit limbs, so that limbs of several sums can be added as integers (by ranks,
/// in a packet of kNumLimbs int64) before anyone normalises them. Cost: add() ~2 ns; 552 bytes. A
/// value type; not thread-safe.
class ExactSum {
 public:
  /// 2098 bits from 2^-1074 to 2^1023, 62 bits of growth, the sign; the last limb counts terms that
  /// are not finite.
  static constexpr int kNumDigits = 68;
  static constexpr int kNumLimbs = kNumDigits + 1;
  using Limbs = std::array<int64_t, kNumLimbs>;

  void add(double term);
  void add(const ExactSum& other);

  /// Nearest double, ties to even; infinite beyond the range; NaN if a term was not finite.
  double to_double() const;
  /// Terms added that were infinite or NaN.
  int64_t non_finite_terms() const { return limbs_[kNumDigits]; }

  /// Normalised limbs, for a packet: the sums of up to 2^29 such arrays, limb by limb, are valid
  /// for from_limbs().
  Limbs limbs() const;
  static ExactSum from_limbs(const Limbs& limbs);

  /// Equal value and equal count of non-finite terms.
  bool operator==(const ExactSum& other) const { return limbs() == other.limbs(); }

 private:
  /// Brings every digit but the top one into [0, 2^32); the top one carries the sign.
  void normalise();

  Limbs limbs_{};
  int64_t terms_since_normalise_ = 0;
};

}  // namespace fsdp::kernels
