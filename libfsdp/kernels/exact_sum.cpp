#include "libfsdp/kernels/exact_sum.h"

#include <bit>
#include <cmath>
#include <limits>

#include "libfsdp/kernels/element_math.h"

namespace fsdp::kernels {
namespace {

constexpr int64_t kDigitMask = 0xffffffff;
constexpr int64_t kMaxTerms = int64_t{1} << 28;  // each adds less than 2^34 to a limb
constexpr int kLowestExponent = -1074;           // of the last bit of digit 0

static_assert(ExactSum::kNumLimbs == kExactSumLimbs);

void negate_digits(ExactSum::Limbs& limbs) {
  for (int i = 0; i < ExactSum::kNumDigits; ++i) limbs[i] = -limbs[i];
}

}  // namespace

void ExactSum::add(double term) {
  spread_exact_term(term, [this](int index, int64_t amount) { limbs_[index] += amount; });
  if (++terms_since_normalise_ >= kMaxTerms) normalise();
}

void ExactSum::add(const ExactSum& other) {
  const Limbs addend = other.limbs();
  for (int i = 0; i < kNumLimbs; ++i) limbs_[i] += addend[i];
  if (++terms_since_normalise_ >= kMaxTerms) normalise();
}

void ExactSum::normalise() {
  int64_t carry = 0;
  for (int i = 0; i + 1 < kNumDigits; ++i) {
    const int64_t value = limbs_[i] + carry;
    limbs_[i] = value & kDigitMask;
    carry = value >> 32;  // rounds down, so that the digit left behind is not negative
  }
  limbs_[kNumDigits - 1] += carry;
  terms_since_normalise_ = 0;
}

ExactSum::Limbs ExactSum::limbs() const {
  ExactSum copy = *this;
  copy.normalise();
  return copy.limbs_;
}

ExactSum ExactSum::from_limbs(const Limbs& limbs) {
  ExactSum sum;
  sum.limbs_ = limbs;
  sum.normalise();
  return sum;
}

double ExactSum::to_double() const {
  if (non_finite_terms() != 0) return std::numeric_limits<double>::quiet_NaN();
  ExactSum magnitude = from_limbs(limbs_);
  const bool negative = magnitude.limbs_[kNumDigits - 1] < 0;
  if (negative) {
    negate_digits(magnitude.limbs_);
    magnitude.normalise();
  }
  int top = kNumDigits - 1;
  while (top > 0 && magnitude.limbs_[top] == 0) --top;
  // The leading 64 bits, the last of them sticky for everything below: one rounding, to nearest
  // even, follows.
  const auto digit = [&](int i) { return i >= 0 ? static_cast<uint64_t>(magnitude.limbs_[i]) : 0; };
  const int zeros = std::countl_zero(static_cast<uint32_t>(digit(top)));
  uint64_t leading = (digit(top) << 32) | digit(top - 1);
  bool sticky = false;
  if (zeros > 0 && zeros < 32) {
    sticky = (digit(top - 2) & (kDigitMask >> zeros)) != 0;
    leading = (leading << zeros) | (digit(top - 2) >> (32 - zeros));
  } else {
    sticky = digit(top - 2) != 0;
  }
  for (int i = top - 3; i >= 0 && !sticky; --i) sticky = magnitude.limbs_[i] != 0;
  const int shift = zeros < 32 ? zeros : 0;
  const double value = std::ldexp(static_cast<double>(leading | (sticky ? 1U : 0U)),
                                  kLowestExponent + 32 * (top - 1) - shift);
  return negative ? -value : value;
}

}  // namespace fsdp::kernels
