// Weights in 4 bits (NF4, FP4) and in 8 bits (rows of int8), in bitsandbytes' formats: the CPU's
// loops. See Note [4-bit weights] and Note [bitsandbytes' arithmetic] in four_bit.h.
//
// All work on ranges: of a tensor cut at multiples of the block size each part is quantised, and
// read, as in the whole. Element types are f32, bf16 and f16; any other throws InternalError.
#pragma once

#include <cstdint>

#include "libfsdp/base/dtype.h"
#include "libfsdp/kernels/four_bit.h"

namespace fsdp::kernels {

/// Values and midpoints of a code, in host memory.
const FourBitTable& four_bit_table(FourBitCode code);

/// Quantises `numel` elements that begin at a block and end at one, or at the tensor's end: a short
/// last block is scaled by a division and has at least 1e-38, as in bitsandbytes. Writes
/// (numel + 1) / 2 bytes (the last half byte of an odd number is the code of zero) and
/// ceil(numel / blocksize) scales. A scale is infinite or NaN when, and only when, its block has
/// such an element; then its codes mean nothing. Requires: blocksize even. Cost: one pass, compute
/// bound.
void quantize_4bit(const void* values, DType dtype, int64_t numel, FourBitCode code,
                   int64_t blocksize, uint8_t* packed, float* absmax);

/// Elements of a range that begins at a block, from its codes and its blocks' scales: as many as
/// wanted, also odd numbers. Cost: one pass at the speed of the memory that is written.
void dequantize_4bit(const uint8_t* packed, const float* absmax, int64_t numel, FourBitCode code,
                     int64_t blocksize, void* values, DType dtype);

/// Mean of a tensor's scales, with the bits of torch's mean of them on an x86 CPU by one thread (up
/// to 32767 values: by any number).
float mean_absmax(const float* absmax, int64_t n);

/// Double quantisation of scales, `offset` being the mean of the whole tensor's: n codes and
/// ceil(n / 256) scales of scales. A range begins at a multiple of 256 scales of the tensor.
void quantize_absmax(const float* absmax, int64_t n, float offset, uint8_t* codes,
                     float* nested_absmax);

/// Scales from their codes, for any range: `skip` = how many codes of the first one's block of 256
/// come before it; nested_absmax[0] is that block's.
void dequantize_absmax(const uint8_t* codes, const float* nested_absmax, float offset, int64_t skip,
                       int64_t n, float* absmax);

/// Rows of a matrix in int8 with one scale each, as Linear8bitLt keeps them. The elements count as
/// halves: one that is too large for a half makes its row's scale infinite.
void quantize_int8(const void* values, DType dtype, int64_t rows, int64_t columns, int8_t* codes,
                   float* absmax);

/// Elements of any range: `skip` = elements of the first one's row that come before it; absmax[0]
/// is that row's.
void dequantize_int8(const int8_t* codes, const float* absmax, int64_t columns, int64_t skip,
                     int64_t numel, void* values, DType dtype);

}  // namespace fsdp::kernels
