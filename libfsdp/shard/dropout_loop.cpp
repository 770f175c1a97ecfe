#include "libfsdp/shard/dropout_loop.h"

#include <algorithm>
#include <cmath>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/cpu_clones.h"
#include "libfsdp/kernels/philox.h"

namespace fsdp {
namespace {

constexpr int kLanes = 16;
constexpr int kBlock = 4 * kLanes;  // elements

struct Mask {
  uint64_t key;
  uint32_t threshold;  // Bits below it drop the element.
  float scale;
};

Mask make_mask(uint64_t key, double p) {
  const double threshold = std::min(std::round(p * 0x1p32), 0x1p32 - 1);
  return {key, static_cast<uint32_t>(threshold),
          p < 1 ? static_cast<float>(1 / (1 - p)) : 0.0F};  // p = 1 drops all, by the scale.
}

// Random words of the elements [64 block, 64 block + 64).
FSDP_HD void block_words(uint64_t key, uint64_t block, uint32_t (&words)[4][kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t counter = block * kLanes + static_cast<uint64_t>(lane);
    words[0][lane] = static_cast<uint32_t>(counter);
    words[1][lane] = static_cast<uint32_t>(counter >> 32);
    words[2][lane] = 0;
    words[3][lane] = 0;
  }
  auto key0 = static_cast<uint32_t>(key);
  auto key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kernels::kPhiloxRounds; ++round) {
    for (int lane = 0; lane < kLanes; ++lane) {
      kernels::PhiloxWords x{{words[0][lane], words[1][lane], words[2][lane], words[3][lane]}};
      kernels::philox_round(x, key0, key1);
      for (int w = 0; w < 4; ++w) words[w][lane] = x.word[w];
    }
    key0 += kernels::kPhiloxWeyl0;
    key1 += kernels::kPhiloxWeyl1;
  }
}

// Factors of the 64 elements of a block. Written with masks: a choice between two values would keep
// the loop from becoming vectors.
FSDP_HD void block_factors(const Mask& mask, uint64_t block, float (&factors)[kBlock]) {
  uint32_t words[4][kLanes];
  block_words(mask.key, block, words);
  const uint32_t threshold = mask.threshold;
  const uint32_t scale = kernels::float_bits(mask.scale);
  for (int w = 0; w < 4; ++w) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t keep = 0U - static_cast<uint32_t>(words[w][lane] >= threshold);
      factors[w * kLanes + lane] = kernels::bits_float(scale & keep);
    }
  }
}

struct F32Element : kernels::F32Source {
  static FSDP_HD float narrow(float value) { return value; }
};
struct Bf16Element : kernels::Bf16Source {
  // As float_to_bf16, without a branch.
  static FSDP_HD uint16_t narrow(float value) {
    const uint32_t bits = kernels::float_bits(value);
    const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    const bool is_nan = (bits & 0x7fffffffU) > 0x7f800000U;
    return static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40U : rounded);
  }
};
struct F16Element : kernels::F16Source {
  static uint16_t narrow(float value) { return float_to_f16(value); }
};

template <class Element>
FSDP_HD void dropout_loop(const typename Element::Storage* from, typename Element::Storage* to,
                          int64_t begin, int64_t n, const Mask& mask) {
  float factors[kBlock];
  int64_t i = 0;
  while (i < n) {
    const int64_t element = begin + i;
    const int64_t first = element % kBlock;
    const int64_t count = std::min(kBlock - first, n - i);
    block_factors(mask, static_cast<uint64_t>(element / kBlock), factors);
    if (count == kBlock) {
      for (int64_t j = 0; j < kBlock; ++j)
        to[i + j] = Element::narrow(Element::widen(from[i + j]) * factors[j]);
    } else {
      for (int64_t j = 0; j < count; ++j)
        to[i + j] = Element::narrow(Element::widen(from[i + j]) * factors[first + j]);
    }
    i += count;
  }
}

FSDP_CPU_CLONES void dropout_f32(const float* from, float* to, int64_t begin, int64_t n,
                                 const Mask& mask) {
  dropout_loop<F32Element>(from, to, begin, n, mask);
}
FSDP_CPU_CLONES void dropout_bf16(const uint16_t* from, uint16_t* to, int64_t begin, int64_t n,
                                  const Mask& mask) {
  dropout_loop<Bf16Element>(from, to, begin, n, mask);
}
FSDP_CPU_CLONES void dropout_f16(const uint16_t* from, uint16_t* to, int64_t begin, int64_t n,
                                 const Mask& mask) {
  dropout_loop<F16Element>(from, to, begin, n, mask);
}

}  // namespace

void apply_dropout(const void* from, void* to, DType dtype, int64_t begin, int64_t n, uint64_t key,
                   double p) {
  const Mask mask = make_mask(key, p);
  const auto* bits = static_cast<const uint16_t*>(from);
  switch (dtype) {
    case DType::kF32:
      return dropout_f32(static_cast<const float*>(from), static_cast<float*>(to), begin, n, mask);
    case DType::kBF16:
      return dropout_bf16(bits, static_cast<uint16_t*>(to), begin, n, mask);
    case DType::kF16:
      return dropout_f16(bits, static_cast<uint16_t*>(to), begin, n, mask);
    default:
      throw InternalError(cat("dropout: no loop for ", dtype_name(dtype),
                              "; expected float32, bfloat16 or float16"));
  }
}

}  // namespace fsdp
