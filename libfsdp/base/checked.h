// Arithmetic that cannot overflow in silence. Use it for every number that comes from a file.
#pragma once

#include <cstdint>
#include <string_view>

#include "libfsdp/base/error.h"

namespace fsdp {

/// a * b; throws E naming `what` on overflow.
template <class E = InternalError>
int64_t checked_mul(int64_t a, int64_t b, std::string_view what) {
  int64_t result;
  if (__builtin_mul_overflow(a, b, &result)) throw E(cat(what, ": ", a, " * ", b, " overflows"));
  return result;
}

/// a + b; throws E naming `what` on overflow.
template <class E = InternalError>
int64_t checked_add(int64_t a, int64_t b, std::string_view what) {
  int64_t result;
  if (__builtin_add_overflow(a, b, &result)) throw E(cat(what, ": ", a, " + ", b, " overflows"));
  return result;
}

/// Smallest multiple of `quantum` that is >= `value` (both >= 0, quantum > 0).
constexpr int64_t round_up(int64_t value, int64_t quantum) {
  return (value + quantum - 1) / quantum * quantum;
}

}  // namespace fsdp
