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
  alignas(64) Storage products[16];

  FSDP_HD Block(const FourBitRange& range, int64_t at)
      : n(std::min(range.blocksize, range.numel - at)),
        packed(range.packed + at / 2),
        to(static_cast<Storage*>(range.values) + at) {
    const float absmax = range.absmax[at / range.blocksize];
    for (int k = 0; k < 16; ++k) products[k] = To::round(range.table[k] * absmax);
  }
  /// Elements from `i`, which is even, one by one.
  FSDP_HD void expand_from(int64_t i) const {
    for (; i + 2 <= n; i += 2) {
      to[i] = products[packed[i / 2] >> 4];
      to[i + 1] = products[packed[i / 2] & 15];
    }
    if (i < n) to[i] = products[packed[i / 2] >> 4];
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
FSDP_AVX2 inline int64_t expand_avx2(const uint8_t* packed, const uint16_t* products, int64_t n,
                                     uint16_t* to) {
  const auto* const table = reinterpret_cast<const __m128i*>(products);
  const __m128i first = _mm_load_si128(table);
  const __m128i last = _mm_load_si128(table + 1);
  const __m128i byte = _mm_set1_epi16(0xff);
  const __m128i low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(last, byte));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(last, 8));
  int64_t i = 0;
  for (; i + kRound <= n; i += kRound) {
    const Codes codes = load_codes(packed + i / 2);
    store_halves(codes.first, low, high, to + i);
    store_halves(codes.last, low, high, to + i + 16);
  }
  return i;
}

/// 8 elements: looked up in both halves of the table, then chosen by bit 3 of the code.
FSDP_AVX2 inline void store_floats(__m128i codes, __m256 low, __m256 high, float* to) {
  const __m256i wide = _mm256_cvtepu8_epi32(codes);
  const __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 28));
  _mm256_storeu_ps(to, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, wide),
                                        _mm256_permutevar8x32_ps(high, wide), choice));
}

FSDP_AVX2 inline int64_t expand_avx2(const uint8_t* packed, const float* products, int64_t n,
                                     float* to) {
  const __m256 low = _mm256_load_ps(products);
  const __m256 high = _mm256_load_ps(products + 8);
  int64_t i = 0;
  for (; i + kRound <= n; i += kRound) {
    const Codes codes = load_codes(packed + i / 2);
    store_floats(codes.first, low, high, to + i);
    store_floats(_mm_srli_si128(codes.first, 8), low, high, to + i + 8);
    store_floats(codes.last, low, high, to + i + 16);
    store_floats(_mm_srli_si128(codes.last, 8), low, high, to + i + 24);
  }
  return i;
}

/// 16 elements. (With masks of all ones: g++ 12 warns about the forms without.)
FSDP_AVX512 inline void store_floats(__m128i codes, __m512 table, float* to) {
  const __m512i wide = _mm512_maskz_cvtepu8_epi32(0xffff, codes);
  _mm512_storeu_ps(to, _mm512_maskz_permutexvar_ps(0xffff, wide, table));
}

FSDP_AVX512 inline int64_t expand_avx512(const uint8_t* packed, const uint16_t* products, int64_t n,
                                         uint16_t* to) {
  return expand_avx2(packed, products, n, to);
}
FSDP_AVX512 inline int64_t expand_avx512(const uint8_t* packed, const float* products, int64_t n,
                                         float* to) {
  const __m512 table = _mm512_load_ps(products);
  int64_t i = 0;
  for (; i + kRound <= n; i += kRound) {
    const Codes codes = load_codes(packed + i / 2);
    store_floats(codes.first, table, to + i);
    store_floats(codes.last, table, to + i + 16);
  }
  return i;
}

template <class To>
__attribute__((target("avx2"))) void expand_with_avx2(const FourBitRange& range) {
  for (int64_t at = 0; at < range.numel; at += range.blocksize) {
    const Block<To> block(range, at);
    block.expand_from(expand_avx2(block.packed, block.products, block.n, block.to));
  }
}
template <class To>
__attribute__((target(FSDP_AVX512_PARTS))) void expand_with_avx512(const FourBitRange& range) {
  for (int64_t at = 0; at < range.numel; at += range.blocksize) {
    const Block<To> block(range, at);
    block.expand_from(expand_avx512(block.packed, block.products, block.n, block.to));
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
