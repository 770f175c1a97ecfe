#include "libfsdp/kernels/four_bit_expand.h"

#include <algorithm>

#if defined(__x86_64__) && defined(__GNUC__)
#define FSDP_EXPAND_X86 1
#include <immintrin.h>
#endif

namespace fsdp::kernels {
namespace {

constexpr int64_t kRound = 32;  // Elements that one round of the vector loops writes.

/// A block of a range: n elements from `at`, of which there are 16 kinds.
template <class To>
struct Block {
  using Storage = typename To::Storage;
  int64_t n;
  const uint8_t* packed;
  Storage* to;
  alignas(64) float products[16];  ///< Not rounded yet.

  FSDP_HD Block(const FourBitRange& range, int64_t at)
      : n(std::min(range.blocksize, range.numel - at)),
        packed(range.packed + at / 2),
        to(static_cast<Storage*>(range.values) + at) {
    const float absmax = range.absmax[at / range.blocksize];
    for (int k = 0; k < 16; ++k) products[k] = range.table[k] * absmax;
  }
  /// Elements from `i`, which is even, one by one.
  FSDP_HD void expand_from(int64_t i) const {
    if (i == n) return;
    Storage rounded[16];
    for (int k = 0; k < 16; ++k) rounded[k] = To::round(products[k]);
    for (; i + 2 <= n; i += 2) {
      to[i] = rounded[packed[i / 2] >> 4];
      to[i + 1] = rounded[packed[i / 2] & 15];
    }
    if (i < n) to[i] = rounded[packed[i / 2] >> 4];
  }
};

template <class To>
void expand_plain(const FourBitRange& range) {
  for (int64_t at = 0; at < range.numel; at += range.blocksize) Block<To>(range, at).expand_from(0);
}

#ifdef FSDP_EXPAND_X86

#define FSDP_AVX2 __attribute__((target("avx2"), always_inline))
#define FSDP_AVX512_PARTS "avx512f,avx512bw,avx512vl,avx2"
#define FSDP_AVX512 __attribute__((target(FSDP_AVX512_PARTS), always_inline))

/// The codes of 16 bytes in the order of their elements: of the first 16 and of the last 16.
struct Codes {
  __m128i first, last;
};
FSDP_AVX2 inline Codes load_codes(const uint8_t* packed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i half = _mm_set1_epi8(15);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), half);
  const __m128i low = _mm_and_si128(bytes, half);
  return {_mm_unpacklo_epi8(high, low), _mm_unpackhi_epi8(high, low)};
}

/// 16-bit elements: the low and the high bytes are looked up apart.
FSDP_AVX2 inline void store_halves(__m128i codes, __m128i low, __m128i high, uint16_t* to) {
  const __m128i lows = _mm_shuffle_epi8(low, codes);
  const __m128i highs = _mm_shuffle_epi8(high, codes);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi8(lows, highs));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm_unpackhi_epi8(lows, highs));
}

/// How many elements it wrote; likewise below.
template <class Block>
FSDP_AVX2 inline int64_t expand_halves(const Block& block, __m128i low, __m128i high) {
  int64_t i = 0;
  for (; i + kRound <= block.n; i += kRound) {
    const Codes codes = load_codes(block.packed + i / 2);
    store_halves(codes.first, low, high, block.to + i);
    store_halves(codes.last, low, high, block.to + i + 16);
  }
  return i;
}
template <class To>
FSDP_AVX2 inline int64_t expand_avx2(const Block<To>& block) {
  alignas(16) uint8_t low[16];
  alignas(16) uint8_t high[16];
  for (int k = 0; k < 16; ++k) {
    const uint16_t rounded = To::round(block.products[k]);
    low[k] = static_cast<uint8_t>(rounded);
    high[k] = static_cast<uint8_t>(rounded >> 8);
  }
  return expand_halves(block, _mm_load_si128(reinterpret_cast<const __m128i*>(low)),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(high)));
}

/// 8 elements: looked up in both halves of the table, then chosen by bit 3 of the code.
FSDP_AVX2 inline void store_floats(__m128i codes, __m256 low, __m256 high, float* to) {
  const __m256i wide = _mm256_cvtepu8_epi32(codes);
  const __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 28));
  _mm256_storeu_ps(to, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, wide),
                                        _mm256_permutevar8x32_ps(high, wide), choice));
}

FSDP_AVX2 inline int64_t expand_avx2(const Block<ToF32>& block) {
  const __m256 low = _mm256_load_ps(block.products);
  const __m256 high = _mm256_load_ps(block.products + 8);
  int64_t i = 0;
  for (; i + kRound <= block.n; i += kRound) {
    const Codes codes = load_codes(block.packed + i / 2);
    float* const to = block.to + i;
    store_floats(codes.first, low, high, to);
    store_floats(_mm_srli_si128(codes.first, 8), low, high, to + 8);
    store_floats(codes.last, low, high, to + 16);
    store_floats(_mm_srli_si128(codes.last, 8), low, high, to + 24);
  }
  return i;
}

/// 16 elements. (With masks of all ones: g++ 12 warns about the forms without.)
FSDP_AVX512 inline void store_floats(__m128i codes, __m512 table, float* to) {
  const __m512i wide = _mm512_maskz_cvtepu8_epi32(0xffff, codes);
  _mm512_storeu_ps(to, _mm512_maskz_permutexvar_ps(0xffff, wide, table));
}

/// The bytes of all 16 products stay in registers: stored one by one and loaded as a vector they
/// would cost more than the block. As round_bf16().
FSDP_AVX512 inline int64_t expand_avx512(const Block<ToBf16>& block) {
  constexpr __mmask16 kAll = 0xffff;
  const __m512i bits = _mm512_load_si512(block.products);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __mmask16 is_nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
  const __m512i high_half = _mm512_maskz_srli_epi32(kAll, bits, 16);
  const __m512i odd = _mm512_and_si512(high_half, _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i nearest = _mm512_maskz_srli_epi32(kAll, sum, 16);
  const __m512i rounded = _mm512_mask_or_epi32(nearest, is_nan, high_half, _mm512_set1_epi32(0x40));
  return expand_halves(block, _mm512_maskz_cvtepi32_epi8(kAll, rounded),
                       _mm512_maskz_cvtepi32_epi8(kAll, _mm512_maskz_srli_epi32(kAll, rounded, 8)));
}
FSDP_AVX512 inline int64_t expand_avx512(const Block<ToF16>& block) { return expand_avx2(block); }
FSDP_AVX512 inline int64_t expand_avx512(const Block<ToF32>& block) {
  const __m512 table = _mm512_load_ps(block.products);
  int64_t i = 0;
  for (; i + kRound <= block.n; i += kRound) {
    const Codes codes = load_codes(block.packed + i / 2);
    store_floats(codes.first, table, block.to + i);
    store_floats(codes.last, table, block.to + i + 16);
  }
  return i;
}

template <class To>
__attribute__((target("avx2"))) void expand_with_avx2(const FourBitRange& range) {
  for (int64_t at = 0; at < range.numel; at += range.blocksize) {
    const Block<To> block(range, at);
    block.expand_from(expand_avx2(block));
  }
}
template <class To>
__attribute__((target(FSDP_AVX512_PARTS))) void expand_with_avx512(const FourBitRange& range) {
  for (int64_t at = 0; at < range.numel; at += range.blocksize) {
    const Block<To> block(range, at);
    block.expand_from(expand_avx512(block));
  }
}

#endif

using Expand = void (*)(const FourBitRange&);

template <class To>
Expand choose_expand() {
#ifdef FSDP_EXPAND_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return expand_with_avx512<To>;
  }
  if (__builtin_cpu_supports("avx2")) return expand_with_avx2<To>;
#endif
  return expand_plain<To>;
}

}  // namespace

void expand_four_bit(const FourBitRange& range, DType dtype) {
  static const Expand to_f32 = choose_expand<ToF32>();
  static const Expand to_bf16 = choose_expand<ToBf16>();
  static const Expand to_f16 = choose_expand<ToF16>();
  (dtype == DType::kF32 ? to_f32 : dtype == DType::kBF16 ? to_bf16 : to_f16)(range);
}

}  // namespace fsdp::kernels
