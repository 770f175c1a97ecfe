#include "libfsdp/kernels/quantized_weight.h"

#include <algorithm>
#include <array>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/cpu_clones.h"
#include "libfsdp/kernels/four_bit_expand.h"

namespace fsdp::kernels {
namespace {

constexpr FourBitTable kTables[2] = {make_four_bit_table(FourBitCode::kNf4),
                                     make_four_bit_table(FourBitCode::kFp4)};
constexpr int64_t kPiece = 64;  // Elements that one round of a vector loop handles.

/// Calls body(source) with the source of an element type.
template <class Body>
FSDP_HD void with_source(DType dtype, const Body& body) {
  if (dtype == DType::kF32) return body(F32Source{});
  if (dtype == DType::kBF16) return body(Bf16Source{});
  return body(F16Source{});
}

void check_dtype(DType dtype) {
  check(dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16,
        "quantised weights: expected float32, bfloat16 or float16");
}

/// Bits of the largest magnitude. A NaN is larger than an infinity, which is larger than the rest.
template <class Source>
FSDP_HD uint32_t largest_magnitude(const typename Source::Storage* values, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = float_bits(Source::widen(values[i])) & 0x7fffffffU;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

/// Codes of up to kPiece elements, two in a byte. kDivide: of a short block.
template <class Source, bool kDivide>
FSDP_HD void encode_piece(const typename Source::Storage* __restrict values, int64_t n,
                          const FourBitTable& table, float scale, uint8_t* __restrict packed) {
  uint8_t codes[kPiece + 1];
  const FourBitTable local = table;
  for (int64_t i = 0; i < n; ++i) {
    const float value = Source::widen(values[i]);
    const float scaled = clamp_to_one(kDivide ? value / scale : value * scale);
    codes[i] = static_cast<uint8_t>(four_bit_code(local, scaled));
  }
  if (n % 2 != 0) codes[n] = static_cast<uint8_t>(four_bit_code(local, 0));
  for (int64_t i = 0; i < (n + 1) / 2; ++i)
    packed[i] = static_cast<uint8_t>((codes[2 * i] << 4) | codes[2 * i + 1]);
}

template <class Source, bool kDivide>
FSDP_HD void encode_block(const typename Source::Storage* values, int64_t n,
                          const FourBitTable& table, float scale, uint8_t* packed) {
  int64_t i = 0;
  for (; i + kPiece <= n; i += kPiece)
    encode_piece<Source, kDivide>(values + i, kPiece, table, scale, packed + i / 2);
  if (i < n) encode_piece<Source, kDivide>(values + i, n - i, table, scale, packed + i / 2);
}

struct QuantizeLoop {
  const void* values;
  int64_t numel;
  const FourBitTable& table;
  int64_t blocksize;
  uint8_t* packed;
  float* absmax;

  template <class Source>
  FSDP_HD void operator()(Source) const {
    const auto* const from = static_cast<const typename Source::Storage*>(values);
    const int64_t whole = numel / blocksize * blocksize;
    for (int64_t at = 0; at < whole; at += blocksize) {
      const float scale = bits_float(largest_magnitude<Source>(from + at, blocksize));
      absmax[at / blocksize] = scale;
      encode_block<Source, false>(from + at, blocksize, table, four_bit_factor(scale),
                                  packed + at / 2);
    }
    if (whole == numel) return;
    const float largest = bits_float(largest_magnitude<Source>(from + whole, numel - whole));
    const float scale = largest < kLeastAbsmax ? kLeastAbsmax : largest;
    absmax[whole / blocksize] = scale;
    encode_block<Source, true>(from + whole, numel - whole, table, scale, packed + whole / 2);
  }
};

FSDP_CPU_CLONES
void run_quantize(const QuantizeLoop& loop, DType dtype) { with_source(dtype, loop); }

/// Sums in torch's order: 4 rows of 8 lanes, each carried up through 4 levels, so that each
/// addition meets a number of its own size. `step` sums make one of the next level.
class CascadeSum {
 public:
  static constexpr int64_t kLanes = 8, kRows = 4, kLevels = 4;

  explicit CascadeSum(int64_t rounds) {
    int64_t log2 = 0;
    while ((int64_t{1} << log2) < rounds) ++log2;
    power_ = std::max(int64_t{4}, log2 / kLevels);
  }
  using Sums = std::array<float, kRows * kLanes>;

  FSDP_HD Sums run(const float* values, int64_t rounds) {
    const int64_t step = int64_t{1} << power_;
    int64_t i = 0;
    while (i + step <= rounds) {
      for (const int64_t end = i + step; i < end; ++i) add(levels_[0], values + i * kRows * kLanes);
      for (int64_t level = 1; level < kLevels; ++level) {
        add(levels_[level], levels_[level - 1].data());
        levels_[level - 1].fill(0);
        if ((i & ((step - 1) << (level * power_))) != 0) break;
      }
    }
    for (; i < rounds; ++i) add(levels_[0], values + i * kRows * kLanes);
    for (int64_t level = 1; level < kLevels; ++level) add(levels_[0], levels_[level].data());
    return levels_[0];
  }

 private:
  static FSDP_HD void add(Sums& to, const float* values) {
    for (size_t k = 0; k < to.size(); ++k) to[k] += values[k];
  }
  int64_t power_ = 0;
  std::array<Sums, kLevels> levels_ = {};
};

/// Fewer values than lanes: torch then adds 4 partial sums of single numbers.
float sum_few(const float* values, int64_t n) {
  float partial[4] = {};
  const int64_t whole = n / 4 * 4;
  for (int64_t i = 0; i < whole; ++i) partial[i % 4] += values[i];
  for (int64_t i = whole; i < n; ++i) partial[0] += values[i];
  for (int k = 1; k < 4; ++k) partial[0] += partial[k];
  return partial[0];
}

FSDP_CPU_CLONES
float cascade_sum(const float* values, int64_t n) {
  constexpr int64_t kLanes = CascadeSum::kLanes;
  if (n < kLanes) return sum_few(values, n);
  const int64_t vectors = n / kLanes;
  const int64_t rounds = vectors / CascadeSum::kRows;
  CascadeSum cascade(rounds);
  CascadeSum::Sums sums = cascade.run(values, rounds);
  for (int64_t v = rounds * CascadeSum::kRows; v < vectors; ++v) {
    for (int64_t lane = 0; lane < kLanes; ++lane)
      sums[static_cast<size_t>(lane)] += values[v * kLanes + lane];
  }
  float sum = 0;
  for (int64_t i = vectors * kLanes; i < n; ++i) sum += values[i];
  for (size_t lane = 0; lane < kLanes; ++lane) {
    float of_lane = sums[lane];
    for (size_t row = 1; row < CascadeSum::kRows; ++row) of_lane += sums[row * kLanes + lane];
    sum += of_lane;
  }
  return sum;
}

struct QuantizeInt8Loop {
  const void* values;
  int64_t rows, columns;
  int8_t* codes;
  float* absmax;

  template <class Source>
  FSDP_HD void operator()(Source) const {
    const auto* from = static_cast<const typename Source::Storage*>(values);
    for (int64_t row = 0; row < rows; ++row, from += columns) {
      uint32_t largest = 0;
      for (int64_t i = 0; i < columns; ++i) {
        const uint32_t magnitude = float_bits(as_half<Source>(from[i])) & 0x7fffffffU;
        largest = magnitude > largest ? magnitude : largest;
      }
      const float scale = bits_float(largest);
      absmax[row] = scale;
      int8_t* const to = codes + row * columns;
      for (int64_t i = 0; i < columns; ++i) to[i] = int8_code(as_half<Source>(from[i]), scale);
    }
  }
};

FSDP_CPU_CLONES
void run_quantize_int8(const QuantizeInt8Loop& loop, DType dtype) { with_source(dtype, loop); }

template <class Round>
FSDP_HD void decode_int8_row(const int8_t* codes, float absmax, int64_t n, void* values,
                             int64_t at) {
  auto* const to = static_cast<typename Round::Storage*>(values) + at;
  for (int64_t i = 0; i < n; ++i) to[i] = Round::round(int8_value(codes[i], absmax));
}

FSDP_CPU_CLONES
void decode_int8(const int8_t* codes, float absmax, int64_t n, void* values, int64_t at,
                 DType dtype) {
  if (dtype == DType::kF32) return decode_int8_row<ToF32>(codes, absmax, n, values, at);
  if (dtype == DType::kBF16) return decode_int8_row<ToBf16>(codes, absmax, n, values, at);
  return decode_int8_row<ToF16>(codes, absmax, n, values, at);
}

}  // namespace

const FourBitTable& four_bit_table(FourBitCode code) { return kTables[static_cast<size_t>(code)]; }

void quantize_4bit(const void* values, DType dtype, int64_t numel, FourBitCode code,
                   int64_t blocksize, uint8_t* packed, float* absmax) {
  check_dtype(dtype);
  check(blocksize > 0 && blocksize % 2 == 0, "quantize_4bit: block size");
  run_quantize({values, numel, four_bit_table(code), blocksize, packed, absmax}, dtype);
}

void dequantize_4bit(const uint8_t* packed, const float* absmax, int64_t numel, FourBitCode code,
                     int64_t blocksize, void* values, DType dtype) {
  check_dtype(dtype);
  check(blocksize > 0 && blocksize % 2 == 0, "dequantize_4bit: block size");
  expand_four_bit({packed, absmax, numel, four_bit_table(code).values, blocksize, values}, dtype);
}

float mean_absmax(const float* absmax, int64_t n) {
  return n == 0 ? 0 : cascade_sum(absmax, n) / static_cast<float>(n);
}

void quantize_absmax(const float* absmax, int64_t n, float offset, uint8_t* codes,
                     float* nested_absmax) {
  for (int64_t at = 0; at < n; at += kAbsmaxBlock) {
    const int64_t count = std::min(kAbsmaxBlock, n - at);
    float centred[kAbsmaxBlock];
    for (int64_t i = 0; i < count; ++i) centred[i] = absmax[at + i] - offset;
    const float largest = bits_float(largest_magnitude<F32Source>(centred, count));
    nested_absmax[at / kAbsmaxBlock] = largest;
    if (largest == 0) {
      std::fill_n(codes + at, count, uint8_t{0});
      continue;
    }
    const float factor = 1.0F / largest;
    for (int64_t i = 0; i < count; ++i) centred[i] = absmax_cell(clamp_to_one(centred[i] * factor));
    find_codes(centred, count, true, codes + at);
  }
}

void dequantize_absmax(const uint8_t* codes, const float* nested_absmax, float offset, int64_t skip,
                       int64_t n, float* absmax) {
  check(skip >= 0 && skip < kAbsmaxBlock, "dequantize_absmax: codes to skip");
  const float* const map = signed_dynamic_map().values;
  for (int64_t i = 0; i < n; ++i)
    absmax[i] = absmax_value(map[codes[i]], nested_absmax[(skip + i) / kAbsmaxBlock], offset);
}

void quantize_int8(const void* values, DType dtype, int64_t rows, int64_t columns, int8_t* codes,
                   float* absmax) {
  check_dtype(dtype);
  run_quantize_int8({values, rows, columns, codes, absmax}, dtype);
}

void dequantize_int8(const int8_t* codes, const float* absmax, int64_t columns, int64_t skip,
                     int64_t numel, void* values, DType dtype) {
  check_dtype(dtype);
  check(columns > 0 && skip >= 0 && skip < columns, "dequantize_int8: columns");
  for (int64_t done = 0; done < numel; ++absmax, skip = 0) {
    const int64_t n = std::min(columns - skip, numel - done);
    decode_int8(codes + done, *absmax, n, values, done, dtype);
    done += n;
  }
}

}  // namespace fsdp::kernels
