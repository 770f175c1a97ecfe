#include <array>
#include <cstring>

#include "libfsdp/base/dtype.h"
#include "libfsdp/base/error.h"
#include "libfsdp/io/gguf.h"

namespace fsdp::io {
namespace {

constexpr std::array<GgufTypeInfo, 12> kTypes = {{{GgufType::kF32, "F32", 1, 4},
                                                  {GgufType::kF16, "F16", 1, 2},
                                                  {GgufType::kQ4_0, "Q4_0", 32, 18},
                                                  {GgufType::kQ4_1, "Q4_1", 32, 20},
                                                  {GgufType::kQ5_0, "Q5_0", 32, 22},
                                                  {GgufType::kQ5_1, "Q5_1", 32, 24},
                                                  {GgufType::kQ8_0, "Q8_0", 32, 34},
                                                  {GgufType::kQ4_K, "Q4_K", 256, 144},
                                                  {GgufType::kQ5_K, "Q5_K", 256, 176},
                                                  {GgufType::kQ6_K, "Q6_K", 256, 210},
                                                  {GgufType::kF64, "F64", 1, 8},
                                                  {GgufType::kBF16, "BF16", 1, 2}}};

template <class T>
T load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

float half(const uint8_t* at) { return f16_to_float(load<uint16_t>(at)); }

// Blocks of 32: a scale d, perhaps a minimum m, the fifth bits, then the low four bits: element j
// in the low half of byte j, element j + 16 in the high half.

/// The 32 numbers of 4 bits, and 5 with the bits of `fifth`.
void unpack_nibbles(const uint8_t* low, uint32_t fifth, int* q) {
  for (int j = 0; j < 16; ++j) {
    q[j] = (low[j] & 15) | static_cast<int>((fifth >> j) & 1U) << 4;
    q[j + 16] = (low[j] >> 4) | static_cast<int>((fifth >> (j + 16)) & 1U) << 4;
  }
}

void decode_centred(const uint8_t* low, uint32_t fifth, int centre, float d, float* out) {
  int q[32];
  unpack_nibbles(low, fifth, q);
  for (int j = 0; j < 32; ++j) out[j] = static_cast<float>(q[j] - centre) * d;
}

void decode_with_minimum(const uint8_t* low, uint32_t fifth, float d, float m, float* out) {
  int q[32];
  unpack_nibbles(low, fifth, q);
  for (int j = 0; j < 32; ++j) out[j] = static_cast<float>(q[j]) * d + m;
}

void decode_q8_0(const uint8_t* block, float* out) {
  const float d = half(block);
  for (int j = 0; j < 32; ++j) out[j] = static_cast<float>(load<int8_t>(block + 2 + j)) * d;
}

// Blocks of 256 ("K"): 8 groups of 32 with a scale and a minimum of 6 bits each, packed into 12
// bytes.

struct ScaleAndMinimum {
  float scale;
  float minimum;
};

ScaleAndMinimum group_scale(const uint8_t* packed, int group) {
  if (group < 4) {
    return {static_cast<float>(packed[group] & 63), static_cast<float>(packed[group + 4] & 63)};
  }
  const uint8_t low = packed[group + 4];
  return {static_cast<float>((low & 15) | (packed[group - 4] >> 6) << 4),
          static_cast<float>((low >> 4) | (packed[group] >> 6) << 4)};
}

/// Q4_K and, with the fifth bits, Q5_K. Two groups share 32 bytes: low halves, then high halves.
void decode_k45(const uint8_t* block, const uint8_t* fifth, const uint8_t* low, float* out) {
  const float d = half(block), d_min = half(block + 2);
  for (int group = 0; group < 8; ++group) {
    const auto [scale, minimum] = group_scale(block + 4, group);
    const float group_d = d * scale, group_m = d_min * minimum;
    const uint8_t* bytes = low + 32 * (group / 2);
    const int shift = group % 2 * 4;
    for (int j = 0; j < 32; ++j) {
      const int top = fifth == nullptr ? 0 : (fifth[j] >> group & 1) << 4;
      out[32 * group + j] = group_d * static_cast<float>((bytes[j] >> shift & 15) | top) - group_m;
    }
  }
}

/// 16 groups of 16 with a signed scale each; in each half of the block four runs of 32 share the
/// bytes.
void decode_q6_k(const uint8_t* block, float* out) {
  const float d = half(block + 208);
  for (int i = 0; i < 256; ++i) {
    const int part = i / 128, run = i % 128 / 32, j = i % 32;
    const int low = block[64 * part + 32 * (run % 2) + j] >> (run / 2 * 4) & 15;
    const int top = block[128 + 32 * part + j] >> (2 * run) & 3;
    const auto scale = static_cast<float>(load<int8_t>(block + 192 + i / 16));
    out[i] = d * scale * static_cast<float>((low | top << 4) - 32);
  }
}

void decode_block(GgufType type, const uint8_t* block, float* out) {
  switch (type) {
    case GgufType::kQ4_0:
      return decode_centred(block + 2, 0, 8, half(block), out);
    case GgufType::kQ4_1:
      return decode_with_minimum(block + 4, 0, half(block), half(block + 2), out);
    case GgufType::kQ5_0:
      return decode_centred(block + 6, load<uint32_t>(block + 2), 16, half(block), out);
    case GgufType::kQ5_1:
      return decode_with_minimum(block + 8, load<uint32_t>(block + 4), half(block), half(block + 2),
                                 out);
    case GgufType::kQ8_0:
      return decode_q8_0(block, out);
    case GgufType::kQ4_K:
      return decode_k45(block, nullptr, block + 16, out);
    case GgufType::kQ5_K:
      return decode_k45(block, block + 16, block + 48, out);
    case GgufType::kQ6_K:
      return decode_q6_k(block, out);
    default:
      throw InternalError("not a quantised GGUF type");
  }
}

}  // namespace

const GgufTypeInfo& gguf_type_info(uint32_t number) {
  std::string known;
  for (const GgufTypeInfo& info : kTypes) {
    if (static_cast<uint32_t>(info.type) == number) return info;
    known += cat(known.empty() ? "" : ", ", info.name);
  }
  throw ModelError(cat("tensor type ", number, " is not supported, expected one of ", known));
}

void gguf_decode(GgufType type, std::span<const std::byte> blocks, std::span<float> out) {
  const GgufTypeInfo& info = gguf_type_info(static_cast<uint32_t>(type));
  const auto block_numel = static_cast<size_t>(info.block_numel),
             block_bytes = static_cast<size_t>(info.block_bytes);
  check(out.size() % block_numel == 0 && blocks.size() == out.size() / block_numel * block_bytes,
        "gguf_decode: whole blocks are needed");
  switch (type) {
    case GgufType::kF32:
      return convert_floats(blocks.data(), DType::kF32, out.data(), DType::kF32, out.size());
    case GgufType::kF16:
      return convert_floats(blocks.data(), DType::kF16, out.data(), DType::kF32, out.size());
    case GgufType::kBF16:
      return convert_floats(blocks.data(), DType::kBF16, out.data(), DType::kF32, out.size());
    case GgufType::kF64:
      return convert_floats(blocks.data(), DType::kF64, out.data(), DType::kF32, out.size());
    default:
      break;
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(blocks.data());
  for (size_t i = 0; i < out.size() / block_numel; ++i) {
    decode_block(type, bytes + i * block_bytes, out.data() + i * block_numel);
  }
}

}  // namespace fsdp::io
