// Sixteen floats at a time, in GCC's vector extension: the compiler splits them for smaller
// instruction sets. For our .cpp files; everything is inlined into functions compiled once per
// instruction set (kernels/cpu_clones.h).
#pragma once

#include <cstdint>
#include <cstring>

namespace fsdp::models {

#define FSDP_INLINE inline __attribute__((always_inline))
#define FSDP_INLINED __attribute__((always_inline))  // after the parameters of a lambda

constexpr int64_t kLanes = 16;
typedef float V16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));

FSDP_INLINE V16 splat(float value) { return V16{} + value; }
FSDP_INLINE V16 as_float(I16 bits) { return reinterpret_cast<V16>(bits); }
FSDP_INLINE I16 as_int(V16 value) { return reinterpret_cast<I16>(value); }
FSDP_INLINE V16 max(V16 a, V16 b) { return a > b ? a : b; }

/// Loads: `count` elements, the other lanes are zero.
FSDP_INLINE V16 load(const float* from) {
  V16 v;
  memcpy(&v, from, sizeof v);
  return v;
}
FSDP_INLINE V16 load(const uint16_t* from) {  // bfloat16
  H16 h;
  memcpy(&h, from, sizeof h);
  return reinterpret_cast<V16>(__builtin_convertvector(h, U16) << 16);
}
FSDP_INLINE void store(float* to, V16 v) { memcpy(to, &v, sizeof v); }
FSDP_INLINE void store(uint16_t* to, V16 v) {  // nearest, ties to even; NaN stays NaN
  const U16 bits = reinterpret_cast<U16>(v);
  const U16 rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const U16 nan = (bits >> 16) | 0x40U;
  const H16 h = __builtin_convertvector((bits & 0x7fffffffU) > 0x7f800000U ? nan : rounded, H16);
  memcpy(to, &h, sizeof h);
}
template <class T>
FSDP_INLINE V16 load_some(const T* from, int64_t count) {
  T part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = from[i];
  return load(part);
}
template <class T>
FSDP_INLINE void store_some(T* to, V16 v, int64_t count) {
  T part[kLanes];
  store(part, v);
  for (int64_t i = 0; i < count; ++i) to[i] = part[i];
}

FSDP_INLINE float sum_lanes(V16 v) {
  float sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}
FSDP_INLINE float max_lanes(V16 v) {
  float most = v[0];
  for (int64_t i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

/// e^x to about one unit in the last place; 0 below -87.3, about 3.4e38 above 88.7, NaN stays NaN.
FSDP_INLINE V16 exp(V16 x) {
  const V16 low = splat(-87.33F), high = splat(88.72F), magic = splat(12582912.0F);
  const I16 tiny = x < low;
  x = x > high ? high : x;
  const V16 shifted =
      (tiny ? low : x) * 1.44269504088896341F + magic;  // rounds to an integer in the low bits
  const V16 n = shifted - magic;
  const V16 r = (tiny ? low : x) - n * 0.693359375F - n * -2.12194440e-4F;
  V16 p = splat(1.9875691500e-4F);
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  // 2^n in two factors: n can be 128, whose single factor would be infinite.
  const I16 whole = as_int(shifted) - as_int(magic), half = whole >> 1;
  const V16 result = p * as_float((half + 127) << 23) * as_float((whole - half + 127) << 23);
  return tiny ? V16{} : result;
}

/// Calls body(i, count) over [0, n): count is kLanes, then what is left. Two calls, so that the
/// full one is unrolled.
template <class Full, class Part>
FSDP_INLINE void for_lanes(int64_t n, Full full, Part part) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) full(i);
  if (i < n) part(i, n - i);
}

}  // namespace fsdp::models
